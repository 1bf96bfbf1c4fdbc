"""The parts of a run: what is checked first, said, saved, looked at and published. The loop itself is `train.py`."""
