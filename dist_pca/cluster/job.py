"""The old path of `dist_pca.tools.cluster.job`, which copied batch scripts run; it goes with version 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dist_pca.tools.cluster.job", run_name="__main__", alter_sys=True)
