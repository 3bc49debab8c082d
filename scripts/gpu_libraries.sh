# Sourced: lets programs find cuBLAS and cuDNN, in the toolkit or else in PyTorch's wheels.
libraries=$(python3 - <<'PY' 2>/dev/null
import glob, os, site
roots = site.getsitepackages() + [site.getusersitepackages()]
print(":".join(d for r in roots for d in glob.glob(os.path.join(r, "nvidia", "*", "lib"))))
PY
)
LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64:$libraries
export LD_LIBRARY_PATH
