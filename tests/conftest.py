import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'scripts')]

import utils  # noqa: E402,F401  before paddle: it quiets paddle's start-up notes
