"""`dist-pca evaluate` whose ranks take a second for each image, and write their process ids once they have begun."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from dist_pca.cli import main
from dist_pca.evaluation import evaluate
from dist_pca.evaluation.inference import predict

folder = Path(sys.argv.pop(1))


def slow_predict(*arguments: Any, **options: Any) -> Any:
    (folder / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(1)
    return predict(*arguments, **options)


if __name__ == "__main__":
    vars(evaluate)["predict"] = slow_predict
    main()
