"""Train: `python train.py --help`."""

from bridge.launch.start import main

if __name__ == "__main__":
    main()
