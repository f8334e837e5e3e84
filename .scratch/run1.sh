export PYTHONPATH=src PYTHONUNBUFFERED=1
python3 -c "import torch,triton;print(torch.__version__,triton.__version__,torch.cuda.get_device_name())"
(timeout 150 python3 tests/kernels/gpu_checks.py cuda) 2>&1 | tail -25
timeout 200 python3 .scratch/run1.py 2>&1 | tail -150
