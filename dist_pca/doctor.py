"""`accelerate launch --config_file launch/accelerate/gpu_zero2.yaml -m dist_pca.doctor [CONFIG]`."""

import sys

from dist_pca.tools.doctor.commands import main

if __name__ == "__main__":
    sys.exit(main())
