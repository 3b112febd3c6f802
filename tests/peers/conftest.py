"""Settings that must be there before TensorFlow is imported, by whichever test."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # larq is written for Keras 2
