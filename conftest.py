"""For `pytest bench`: to pytest the folder is a package named bench, which is porthal.bench and no second copy of it."""

import sys

import porthal.bench

sys.modules["bench"] = porthal.bench
