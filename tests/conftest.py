"""Makes bullet_safety_gym usable under pytest."""

import contextlib
import sys

# bullet_safety_gym 1.4.0 hides PyBullet's messages, at its import and in every environment it makes, through
# the C stream called like sys.stderr or sys.stdout. Under pytest's capture no C stream has their names.
captured, sys.stderr = sys.stderr, sys.__stderr__
try:
    from bullet_safety_gym.envs import builder
finally:
    sys.stderr = captured
builder.RedirectStream = contextlib.nullcontext
