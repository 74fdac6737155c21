"""The families we ship. Installed as ``rlhfkit_adapters``; found through entry points, like anyone else's."""

if __name__ == "adapters":
    # From the root of a checkout `import adapters` would give a second copy of every class.
    raise ImportError("this package is imported as 'rlhfkit_adapters'; install the checkout with: pip install -e .")
