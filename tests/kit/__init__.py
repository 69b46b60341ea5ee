"""`make gpu-compare`: plans foretold, then executed by the trainer's own code on one GPU, and compared; `python -m tests.kit FOLDER`."""
