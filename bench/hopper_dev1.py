from bench.hopper_dev import *
t00=time.time()
gen = torch.Generator(dev).manual_seed(1)
b, ws = weights(4, gen)
print("setup", time.time()-t00, torch.cuda.get_device_name(), torch.__version__, triton.__version__)
rows = torch.tensor([0,1,8,17,31,32,63,64,100,4000,7167], device=dev)
variants = [(1,1,2),(1,1,4),(1,1,8),(1,2,4),(2,1,3),(2,2,2),(2,2,3),(2,2,4)]
lists = torch.empty(256*256, dtype=torch.int32, device=dev)
for m in (1, 5, 8):
    for lay in ("128x4", "linear"):
        a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen), layout=lay)
        for kind in ("routed", "dense", "zero"):
            alpha = topk_alpha(m, gen) if kind == "routed" else torch.randn(m, E, device=dev, generator=gen) * (kind == "dense")
            for v in (variants if m == 5 else variants[:2]):
                out = torch.full((m, N), float("nan"), device=dev, dtype=torch.float32)
                try:
                    few(a, *ws[0], alpha, out, lists, *v)
                    ok, e = check(out, b, a, alpha, rows)
                    if not ok or v == variants[0]: print(m, lay, kind, v, ok, e)
                except Exception as ex: print("EXC", v, repr(ex)[:500])
print("checked", time.time()-t00)
# ceilings
big = torch.randint(0, 2**31-1, (2, 264241152 // 4), dtype=torch.int32, device=dev); o = torch.empty(8192, dtype=torch.int32, device=dev)
c = {f"read{g}x{bl}x{w}": [lambda i=i, g=g, bl=bl, w=w: read_kernel[(g,)](big[i % 2], o, big.shape[1], BLOCK=bl, num_warps=w) for i in range(4)] for g, bl, w in ((132*4, 4096, 8), (132*8, 2048, 4), (132*2, 8192, 8), (132*16,2048,8))}
src = big.view(-1)[:2**27].clone(); dst = torch.empty_like(src)
c["copy 512MiB"] = [lambda: dst.copy_(src)] * 2
x = torch.randn(8192, 8192, device=dev, dtype=torch.bfloat16); y = torch.randn(8192, 8192, device=dev, dtype=torch.bfloat16); z = torch.empty_like(x)
c["gemm8192"] = [lambda: torch.mm(x, y, out=z)] * 2
res = bench(c, 7)
for n, (md, lo, hi) in res.items():
    extra = f"{264.24e6/md/1e6:.2f} TB/s" if n.startswith("read") else f"{2*2**29/md/1e6:.2f} TB/s r+w" if n.startswith("copy") else f"{2*8192**3/md/1e6:.0f} TFLOP/s"
    print(f"{n:16s} {md:8.1f} [{lo:.1f},{hi:.1f}] {extra}")
del x, y, z, src, dst
for m in (1, 4, 8):
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen))
    out = torch.empty(m, N, device=dev, dtype=torch.bfloat16)
    al = [topk_alpha(m, gen) for _ in range(24)]; de = [torch.rand(m, E, device=dev, generator=gen) + 0.1 for _ in range(2)]
    for kind, als, reps in (("routed", al, 24), ("dense", de, 8)):
        cands = {v: [lambda v=v, j=j: few(a, *ws[j % 4], als[j % len(als)], out, lists, *v) for j in range(reps)] for v in variants}
        r = bench(cands)
        print(m, kind, " ".join(f"{v}:{x[0]:.1f}" for v, x in r.items()))
print("total", time.time()-t00)
