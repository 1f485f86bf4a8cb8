"""``python -m vae_hyperband`` is ``vae-hyperband``, also where PATH does not have that."""

import sys

from vae_hyperband.train_vae import main

if __name__ == "__main__":
    sys.exit(main())
