"""rlhfkit: SFT, reward model and PPO for people with one GPU."""

__version__ = "0.1.0"
