"""Train a classifier: ``python train.py fit --config configs/train/digits_standard.yaml``."""

from lit_adv.cli import train_main

if __name__ == "__main__":
    train_main()
