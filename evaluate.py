"""Attack a trained classifier: ``python evaluate.py --model.checkpoint PATH --config configs/evaluate/NAME.yaml``."""

from lit_adv.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()
