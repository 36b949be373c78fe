"""Convert model weights: `python convert.py --help`."""

from bridge.launch.convert import main

if __name__ == "__main__":
    main()
