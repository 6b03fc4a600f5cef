"""python -m evaluation: measure checkpoints, see evaluate.py."""
from config import run
from evaluation.evaluate import main

if __name__ == "__main__":
    run(main)
