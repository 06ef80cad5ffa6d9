"""accelerate launch recipes/train.py --config recipes/quickstart.yaml [--any_trl_flag …] [--rewards.0.weight 0.3]"""

import sys

from trl_rewards.train import main

if __name__ == "__main__":
    sys.exit(main())
