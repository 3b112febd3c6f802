# Each target sets up what it needs in a local virtual environment.
.PHONY: demo test check notebooks support-matrix real-code bench test-peers \
  test-oracles test-zoo test-peers-core test-oldest test-oldest-core test-strict test-strict-core clean

NEWEST := $(shell .ci/find-python 3.14 3.13 3.12 3.11)
OLDEST := $(shell .ci/find-python 3.11)
PYTEST := -n auto --dist worksteal -q
STRICT := x64 dtype rank checks leaks
# JAX's coming switches, each turned over by itself.
SWITCHES := remat3 custom_vjp3 custom_jvp3 use_direct_linearize \
  use_simplified_jaxpr_constants mutable_array_checks softmax_custom_jvp \
  use_shardy_partitioner
CORE := check conformance edge flow gates jax nested nonfinite perturb points query \
  references rules scopes statistics trees var wildcards
# Without LLVM's optimizations, which take a fifth of the time. XLA's own are as usual.
QUICK_XLA := XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0"
PIP = $(@D)/bin/python -m pip install -q --disable-pip-version-check
# uv installs in seconds what takes pip minutes, but does not read pip's settings.
UV = $(PIP) uv && $(@D)/bin/uv pip install -q --python $(@D)
INSTALL = { $(UV) $(PACKAGES); } || $(PIP) $(PACKAGES)
# Without their dependencies: larq asks for NumPy 1, tf-keras for the GPU's TensorFlow.
LARQ := larq terminaltables tf-keras

export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

demo: .venv/ready
	.venv/bin/python notebooks/run.py --show 01

test: .venv/ready
	.venv/bin/python -m pytest $(PYTEST)

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/python -m pytest -q tests/test_house.py

notebooks: .venv/ready
	.venv/bin/python notebooks/run.py --update

support-matrix: .venv/ready
	STOPGRAD_FULL=1 .venv/bin/python -m pytest $(PYTEST) tests/test_conformance.py -k test_float32
	cd tests && ../.venv/bin/python test_conformance.py

real-code: .venv-zoo/ready
	$(QUICK_XLA) STOPGRAD_REAL_CODE=write .venv-zoo/bin/python -m pytest $(PYTEST) tests/peers/zoo -k 'not page'

bench: .venv-peers/ready .venv-peers-torch/ready
	.venv-peers/bin/python benchmarks/run.py
	.venv-peers-torch/bin/python benchmarks/estimators.py
	.venv-peers-torch/bin/python benchmarks/training.py

test-peers: test-oracles test-zoo

test-oracles: .venv-peers/ready .venv-peers-torch/ready
	.venv-peers/bin/python -m pytest $(PYTEST) tests/peers --ignore tests/peers/torch --ignore tests/peers/zoo
	.venv-peers-torch/bin/python -m pytest $(PYTEST) tests/peers/torch

test-zoo: .venv-zoo/ready
	$(QUICK_XLA) .venv-zoo/bin/python -m pytest $(PYTEST) tests/peers/zoo

# What CI runs of it: each program, with one of the verbs in turn.
test-peers-core: test-oracles .venv-zoo/ready
	$(QUICK_XLA) .venv-zoo/bin/python -m pytest $(PYTEST) tests/peers/zoo -m core

OLDEST_PYTEST := $(QUICK_XLA) .venv-oldest/bin/python -m pytest $(PYTEST)

test-oldest: .venv-oldest/ready
	$(OLDEST_PYTEST) tests stopgrad_jax --ignore tests/test_notebooks.py

# What depends most on JAX's version and settings, for CI, without what takes long; the
# rest is in the whole runs.
test-oldest-core: .venv-oldest/ready
	$(OLDEST_PYTEST) $(patsubst %,tests/test_%.py,$(filter-out conformance nested,$(CORE)))

# With leak checking the suite leaves out those that are filtered out, but for
# the pairs, which take long.
test-strict-core: .venv/ready
	STOPGRAD_STRICT="$(STRICT)" .venv/bin/python -m pytest $(PYTEST) $(patsubst %,tests/test_%.py,$(filter-out check nested nonfinite references rules,$(CORE)))

# The switches together on both versions, then one by one on the newest.
test-strict: test-strict-together test-strict-together-oldest $(STRICT:%=test-strict-%) \
  $(SWITCHES:%=test-switch-%)

test-switch-%: .venv/ready
	STOPGRAD_SWITCH="jax_$*" .venv/bin/python -m pytest $(PYTEST) $(CORE:%=tests/test_%.py)

test-strict-together: .venv/ready
	STOPGRAD_STRICT="$(STRICT)" .venv/bin/python -m pytest $(PYTEST) tests --ignore tests/test_notebooks.py

test-strict-together-oldest: .venv-oldest/ready
	STOPGRAD_STRICT="$(STRICT)" .venv-oldest/bin/python -m pytest $(PYTEST) tests --ignore tests/test_notebooks.py

test-strict-%: .venv/ready
	STOPGRAD_STRICT="$*" .venv/bin/python -m pytest $(PYTEST) tests --ignore tests/test_notebooks.py

.venv/ready: PACKAGES = -e '.[notebooks,dev]'
.venv/ready: pyproject.toml
	$(NEWEST) -m venv $(@D)
	$(INSTALL)
	touch $@

.venv-oldest/ready: PACKAGES = -e '.[dev]' 'jax==0.10.2' 'jaxlib==0.10.2' scikit-learn
.venv-oldest/ready: pyproject.toml
	@test -n "$(OLDEST)" || { echo "test-oldest needs Python 3.11, and found none"; exit 1; }
	$(OLDEST) -m venv $(@D)
	$(INSTALL)
	touch $@

.venv-peers/ready: PACKAGES = -e '.[dev,peers]'
.venv-peers/ready: pyproject.toml
	$(NEWEST) -m venv $(@D)
	$(INSTALL)
	$(PIP) --no-deps $(LARQ)
	touch $@

# By pip, which can be told on a machine where to find a small torch.
.venv-peers-torch/ready: pyproject.toml
	@test -n "$(OLDEST)" || { echo "test-peers needs Python 3.11, and found none"; exit 1; }
	$(OLDEST) -m venv $(@D)
	$(PIP) -e '.[peers-torch]'
	$(PIP) --no-deps spikingjelly
	touch $@

.venv-zoo/ready: PACKAGES = -e '.[zoo]'
.venv-zoo/ready: pyproject.toml
	$(NEWEST) -m venv $(@D)
	$(INSTALL)
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-peers .venv-peers-torch .venv-zoo build
