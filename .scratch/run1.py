import time, sys, torch, collections
from torch.profiler import profile, ProfilerActivity
from saekit import kernels
from saekit.kernels import gpu, reference, dispatch
from saekit.train import TopK, BatchTopK, JumpReLU, Relu, Gated, Matryoshka
from saekit.train.fused import fused_step, fuses
from saekit.train.learner import plain_step, resolve, start_learner
sys.path.insert(0,'benchmarks/contestants')
from gate import rows
dev='cuda'
def timed(f, reps=20, warm=3):
    for _ in range(warm): f()
    torch.cuda.synchronize(); ts=[]
    for _ in range(reps):
        a,b=torch.cuda.Event(True),torch.cuda.Event(True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    ts.sort(); return ts[len(ts)//2]
def wall(f,reps=20,warm=3):
    for _ in range(warm): f()
    torch.cuda.synchronize(); t=time.perf_counter()
    for _ in range(reps): f()
    torch.cuda.synchronize(); return (time.perf_counter()-t)/reps*1e3
def learner(cfg,d,batch):
    s=rows(d,batch,0).to(dev)
    return start_learner(cfg,0,resolve(cfg,d,10000,batch),bias=s.mean(0),scale=d**0.5/s.norm(dim=1).mean(),sample=s,device=dev)
def shape(d,n,k,b,profile_it=False):
    xs=[rows(d,b,i).to(dev) for i in range(2)]
    l=learner(TopK(n,k=k),d,b); assert fuses(l)
    torch.cuda.reset_peak_memory_stats(); base=torch.cuda.memory_allocated()
    w=wall(lambda: fused_step(l,xs[0])); peak=torch.cuda.max_memory_allocated()
    g=timed(lambda: fused_step(l,xs[0]))
    l2=learner(TopK(n,k=k),d,b)
    torch.cuda.reset_peak_memory_stats()
    p=wall(lambda: plain_step(l2,xs[0]),reps=5,warm=2); pp=torch.cuda.max_memory_allocated()
    W=l.parameters['W_enc'].bfloat16(); xb=xs[0].bfloat16(); out=torch.empty(b,n,device=dev,dtype=torch.bfloat16)
    m=timed(lambda: torch.mm(xb,W.T,out=out))
    e=timed(lambda: gpu.topk_encode(xs[0]-xs[0].mean(0),l.parameters['W_enc'],l.parameters['b_enc'],k))
    ep=timed(lambda: reference.topk_encode(xs[0]-xs[0].mean(0),l.parameters['W_enc'],l.parameters['b_enc'],k),reps=5)
    print(f"d{d} n{n} k{k} b{b}: fused wall {w:.3f} ms, events {g:.3f}; plain {p:.2f}; bf16 mm {m:.3f}; encode {e:.3f} plain encode {ep:.2f}; peak {peak/2**20:.0f} MiB (base {base/2**20:.0f}) plain {pp/2**20:.0f}",flush=True)
    if profile_it:
        with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as prof:
            for i in range(5): fused_step(l,xs[i%2])
            torch.cuda.synchronize()
        rowsd=[(ev.self_device_time_total/5, ev.count/5, ev.key) for ev in prof.key_averages() if ev.self_device_time_total>0]
        rowsd.sort(reverse=True)
        for t,c,k_ in rowsd[:28]: print(f"   {t:8.1f} us  x{c:.0f}  {k_[:90]}")
        print("   total", sum(r[0] for r in rowsd), flush=True)
shape(768,16384,32,4096,True)
for mb in (32,128,256):
    gpu.BLOCK_BYTES=mb*2**20; print("block MB",mb); shape(768,16384,32,4096)
gpu.BLOCK_BYTES=64*2**20
shape(64,2048,16,2048,True)
shape(2304,65536,64,4096,True)
gpu.BLOCK_BYTES=256*2**20; shape(2304,65536,64,4096); gpu.BLOCK_BYTES=64*2**20
# candidates
x=rows(768,4096,0).to(dev); x=x-x.mean(0); W=torch.nn.functional.normalize(torch.randn(16384,768,device=dev)); b=torch.zeros(16384,device=dev)
r,w=gpu._round(x),gpu._round(W); bd=gpu._bound(r,w,b)
for part,P in gpu._blocks(r,w,bd,4096):
    c=torch.empty((4096,128),dtype=torch.int32,device=dev); n=torch.empty(4096,dtype=torch.int32,device=dev)
    gpu._select(P,bd,part,c,n,32,above=False,exact=True)
    print("candidates mean",n.float().mean().item(),"max",n.max().item())
    e=(P.double()-(x.double()@W.double().T)).abs()
    lim=gpu.ROUNDING*P.double().abs()+bd.row[:,None].double()*bd.latent.double()+bd.bias.double()
    print("largest error / bound",(e/lim).max().item())
xb=x.bfloat16(); 
# accumulation alone: exact product of the rounded copies against fp32-out product
f32=torch.mm(xb[:512],W.bfloat16().T,out_dtype=torch.float32) if True else None
ex=xb[:512].double()@W.bfloat16().double().T
acc=((f32.double()-ex).abs()/(xb[:512].double().norm(dim=1,keepdim=True)*W.bfloat16().double().norm(dim=1))).max().item()
print("accumulation error rel to lengths",acc,"allowed", (768+8)*2.0**-22)
try:
    i8=lambda: torch._int_mm(xi,wi)
    xi=(x/x.abs().amax(1,keepdim=True)*127).round().to(torch.int8); wi=(W/W.abs().amax(1,keepdim=True)*127).round().to(torch.int8).T.contiguous().T if False else (W/W.abs().amax(1,keepdim=True)*127).round().to(torch.int8).T
    print("int8 mm ms",timed(i8))
    xf=x.to(torch.float8_e4m3fn); wf=W.to(torch.float8_e4m3fn).T
    one=torch.ones((),device=dev)
    print("fp8 mm ms",timed(lambda: torch._scaled_mm(xf,wf,scale_a=one,scale_b=one,out_dtype=torch.bfloat16)))
except Exception as ex_: print("low",repr(ex_)[:300])
for name,cfg in {"batchtopk":BatchTopK(16384,k=32),"jumprelu":JumpReLU(16384,target_l0=32.),"relu":Relu(16384,target_l0=32.),"gated":Gated(16384,target_l0=32.),"matryoshka":Matryoshka(16384,k=32)}.items():
    l=learner(cfg,768,4096); l2=learner(cfg,768,4096); xs=[rows(768,4096,i).to(dev) for i in range(2)]
    print(name, f"fused {wall(lambda: fused_step(l,xs[0]),reps=10):.2f} plain {wall(lambda: plain_step(l2,xs[0]),reps=5):.2f}",flush=True)
