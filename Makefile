# make demo   environment, procedural data, S2D training of a tiny model, merge, evaluation, a picture
# make test   environment and the default test suite
# make faults fault injection and fuzzing, thorough: docs/reliability.md
# make types  type hints; make docs  the site, in build/site
# make setup  the environment alone: .venv in tested versions
#
# Needs Python 3.11 to 3.13 with venv, a C++ compiler and make. Nothing is done twice.

PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
RUN := $(VENV)/bin/python
# Of pip errors are shown, and not its warnings, such as of an index of this machine that lacks a package. Not with `--log`:
# it would show both, and progress bars.
PIP := $(RUN) -m pip --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt
# ninja, installed first, must be found by the compilation of torch-scatter
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup demo test faults faults-table lint types docs clean

setup: $(VENV)/.s2d3d

demo: $(VENV)/.s2d3d data/shapes/train_files.txt
	$(RUN) tools/train.py configs/demo.yaml $(if $(wildcard runs/demo/checkpoints/last.pt),--resume runs/demo)
	@$(RUN) tools/visualize.py --checkpoint runs/demo/merged.pt --output runs/demo/predictions.png --force \
		|| echo "no picture this time, for the reason above; training and evaluation do not need it"
	@echo "next, one page with curves, confusion matrix and mistakes:"
	@echo "    $(RUN) tools/open.py runs/demo"

# Bytecode is kept, whatever the environment says: without it, each process that a test starts compiles the package anew.
test: $(VENV)/.s2d3d $(VENV)/.browser $(VENV)/.web
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

# Thorough fault injection and fuzzing; it takes long. Notes go to docs/results, the table to docs/reliability.md.
faults: $(VENV)/.s2d3d
	$(RUN) -m pytest $$(PYTHONPATH=tests $(RUN) -m faults.report --tests) -m "not gpu" \
		--faults-report docs/results/faults.json; status=$$?; \
		PYTHONPATH=tests $(RUN) -m faults.report && exit $$status

faults-table: $(VENV)/.s2d3d
	PYTHONPATH=tests $(RUN) -m faults.report

lint: $(VENV)/.s2d3d
	$(RUN) -m ruff check .

types: $(VENV)/.s2d3d
	$(RUN) -m mypy

docs: $(VENV)/.s2d3d
	$(INSTALL) "mkdocs-material>=9.5" "mkdocstrings[python]>=0.25"
	$(RUN) -c 'from s2d3d.config.reference import config_reference as page; print(page(), end="")' \
		> docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

data/shapes/train_files.txt: | $(VENV)/.s2d3d
	$(RUN) tools/prepare_data.py shapes --output data/shapes

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel ninja
	@touch $@

# torch comes first and from the ordinary index: torch-scatter compiles against it, and the ordinary torchvision,
# which timm imports, does not load with a CPU-only torch.
# It needs 6 GB here and 3 for the download; a disk that is too full for it is named before that.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@for place in "$(CURDIR)" "$${TMPDIR:-/tmp}"; do \
		free=$$(df -Pk "$$place" | awk 'NR == 2 { print int($$4 / 1048576) }'); \
		[ "$${free:-99}" -ge 9 ] || { echo "torch needs 9 GB of free disk; $$place has $$free: make room there" >&2; exit 1; }; \
	done
	$(INSTALL) torch torchvision
	@touch $@

# Compiled once (4 to 8 minutes on 2 cores); pip keeps the wheel in its cache. A cached wheel may have been compiled
# against another torch, hence the check. Debug information, which Python's own flags ask for and the linker strips,
# would cost a part of that time. The wheel is made without touching the environment, so that other packages are
# downloaded and installed meanwhile.
SCATTER := CFLAGS="$${CFLAGS-} -g0" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(VENV)/wheels \
	--constraint constraints.txt
define build_scatter
echo "torch-scatter: $(1)"; rm -rf $(VENV)/wheels; \
$(SCATTER) $(2) torch-scatter & build=$$!; \
trap 'kill $$build 2>/dev/null; exit 1' INT TERM; seconds=0; \
while kill -0 $$build 2>/dev/null; do \
	sleep 1; seconds=$$((seconds + 1)); \
	[ $$((seconds % 60)) -ne 0 ] || echo "torch-scatter: $$((seconds / 60)) min"; \
done; \
wait $$build && $(INSTALL) --no-deps --force-reinstall $(VENV)/wheels/*.whl
endef
$(VENV)/.scatter: $(VENV)/.torch
	@$(call build_scatter,taken from pip's cache or compiled for several minutes,)
	@$(RUN) -c 'import torch_scatter' 2>/dev/null \
		|| { $(call build_scatter,compiled anew for this torch,--no-cache-dir); }
	@touch $@

# Everything else, of setup.py. `pip install .` would compile torch-scatter by itself. That it is still missing is no conflict
# to warn of: the last step installs and checks all.
$(VENV)/.others: $(VENV)/.torch setup.py constraints.txt
	$(INSTALL) --no-build-isolation --no-deps --editable .
	@$(RUN) -c "from importlib.metadata import requires; \
		from pip._vendor.packaging.requirements import Requirement as R; \
		listed = [R(text) for text in requires('s2d3d')]; \
		print(*[f'{r.name}{r.specifier}' for r in listed if r.name != 'torch-scatter' \
			and (not r.marker or r.marker.evaluate({'extra': 'test'}))], sep='\n')" > $(VENV)/others.txt
	$(INSTALL) --no-warn-conflicts --requirement $(VENV)/others.txt
	@touch $@

# The last step changes nothing but what the two above may have missed, such as extras of a package.
$(VENV)/.s2d3d: $(VENV)/.torch $(VENV)/.system setup.py constraints.txt
	@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.scatter $(VENV)/.others
	$(INSTALL) --no-build-isolation --editable ".[test]"
	@touch $@

# System libraries of Open3D, which draws pictures. Installed where that is possible, named otherwise.
SYSTEM_PACKAGES := libusb-1.0-0 libegl1 libgl1 libgl1-mesa-dri libgomp1
$(VENV)/.system: | $(VENV)/.python
	@ldconfig=$$(command -v ldconfig || echo /sbin/ldconfig); missing=; \
	for library in libusb-1.0.so.0 libEGL.so.1 libGL.so.1 libgomp.so.1; do \
		$$ldconfig -p 2>/dev/null | grep -q "$$library" || missing="$$missing $$library"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(SYSTEM_PACKAGES) >/dev/null; \
	else \
		echo "for pictures, install what Open3D needs ($$missing ): sudo apt-get install $(SYSTEM_PACKAGES)"; \
	fi
	@touch $@

# A browser (300 MB) for the tests that open pages; where it cannot be had they are skipped, and the next time tries again.
BROWSERS := chromium chromium-browser chromium-headless-shell chrome-headless-shell google-chrome google-chrome-stable
BROWSER_PACKAGE := chromium-headless-shell
$(VENV)/.browser: | $(VENV)/.python
	@for name in $(BROWSERS) $$S2D3D_CHROMIUM; do command -v "$$name" >/dev/null && found=1; done; \
	if [ -z "$$found" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing a browser for the tests that open pages"; \
		{ timeout 300 apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			timeout 600 apt-get install -y -qq --no-install-recommends $(BROWSER_PACKAGE); } >/dev/null 2>&1 && found=1; \
	fi; \
	if [ -n "$$found" ]; then touch $@; else \
		echo "tests that open pages in a browser are skipped; for them: sudo apt-get install $(BROWSER_PACKAGE)"; \
	fi

# ONNX Runtime for browsers (14 MB of the npm package), for the tests of the exported web page; skipped likewise.
WEB_PACKAGE := onnxruntime-web@1.30.0
WEB_FILES := ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm
$(VENV)/.web: | $(VENV)/.python
	@place=$(VENV)/onnxruntime-web; mkdir -p $$place; \
	if command -v npm >/dev/null && npm pack $(WEB_PACKAGE) --silent --pack-destination $$place >/dev/null 2>&1 \
		&& tar xzf $$place/*.tgz -C $$place --strip-components=2 $(addprefix package/dist/,$(WEB_FILES)); then \
		rm $$place/*.tgz; touch $@; \
	else \
		rm -rf $$place; echo "tests of the exported web page are skipped; they need npm, which fetches $(WEB_PACKAGE)"; \
	fi

clean:
	rm -rf $(VENV) build *.egg-info
