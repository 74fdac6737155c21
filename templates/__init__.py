"""Chat templates as package data; see README.md for where each one comes from. Installed as ``rlhfkit_templates``."""

if __name__ == "templates":
    raise ImportError("this package is imported as 'rlhfkit_templates'; install the checkout with: pip install -e .")
