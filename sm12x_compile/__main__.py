"""``python -m sm12x_compile``."""

from .cli import main

if __name__ == "__main__":
    main()
