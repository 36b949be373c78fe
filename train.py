"""Train: `python train.py --help`."""

from bridge.launch.driver import main

if __name__ == "__main__":
    main()
