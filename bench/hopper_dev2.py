from bench.hopper_dev import *
t00=time.time()
gen = torch.Generator(dev).manual_seed(1)
b, ws = weights(4, gen)
rows = torch.tensor([0,1,8,17,31,32,63,64,100,4000,7167], device=dev)
lists = torch.empty(256*256, dtype=torch.int32, device=dev)
for m in (1, 7, 16, 129, 512):
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen), layout="128x4" if m != 7 else "linear")
    for kind in ("routed", "zero", "one_expert", "quarter"):
        al = torch.randn(m, E, device=dev, generator=gen)
        alpha = topk_alpha(m, gen) if kind == "routed" else al * (torch.arange(E, device=dev) == 77) if kind == "one_expert" else al * (torch.rand(m, E, device=dev, generator=gen) < 0.2) if kind == "quarter" else al * 0
        for sets in (1, 4):
            w = Work(m, N, K, E, sets)
            out = torch.full((m, N), float("nan"), device=dev, dtype=torch.float32)
            try:
                routed(a, *ws[0], alpha, out, w, sets); torch.cuda.synchronize()
                ok, e = check(out, b, a, alpha, rows)
                o2 = torch.full_like(out, 7.0); routed(a, *ws[0], alpha, o2, w, sets)
                print(m, kind, sets, ok, e, "same" if torch.equal(out, o2) else "DIFFERENT")
            except Exception as ex: print("EXC", m, kind, repr(ex)[:800]); raise
print("checked", time.time()-t00)
for m in (16, 32, 64, 128, 256, 512):
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen))
    out = torch.empty(m, N, device=dev, dtype=torch.bfloat16)
    al = [topk_alpha(m, gen) for _ in range(6)]
    cands = {}
    for sets in (2, 3, 4, 6, 8):
        w = Work(m, N, K, E, sets)
        cands[f"sets{sets}"] = [lambda w=w, j=j, sets=sets: routed(a, *ws[j % 4], al[j % 6], out, w, sets) for j in range(8)]
        if sets == 4:
            cands["plan"] = [lambda w=w, j=j, sets=sets: routed(a, *ws[j % 4], al[j % 6], out, w, sets, stage=0) for j in range(8)]
            cands["nosum"] = [lambda w=w, j=j, sets=sets: routed(a, *ws[j % 4], al[j % 6], out, w, sets, stage=1) for j in range(8)]
    r = bench(cands)
    print(m, " ".join(f"{v}:{x[0]:.1f}" for v, x in r.items()))
    del cands

DV = {16: [(16,8,1),(16,8,2)], 32: [(32,8,1),(32,8,2)], 64: [(64,8,1),(32,8,1)], 128: [(64,8,1),(128,8,1)], 256: [(64,8,1),(128,8,1)], 384: [(128,8,1)], 512: [(128,8,1)]}
for m in (16, 13, 130):
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen), layout="128x4" if m != 13 else "linear")
    alpha = torch.randn(m, E, device=dev, generator=gen)
    for v in [(16,8,1),(32,8,1),(64,8,1),(128,8,1),(16,8,2)]:
        w = Work(m, N, K, E, 1); out = torch.full((m, N), float("nan"), device=dev, dtype=torch.float32)
        try:
            dense(a, *ws[0], alpha, out, w, *v); torch.cuda.synchronize(); ok, e = check(out, b, a, alpha, rows)
            o2 = torch.full_like(out, 7.0); dense(a, *ws[0], alpha, o2, w, *v)
            print("dense", m, v, ok, e, "same" if torch.equal(out, o2) else "DIFFERENT")
        except Exception as ex: print("EXC", m, v, repr(ex)[:600])
print("dense checked", time.time()-t00)
for m in DV:
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen)); out = torch.empty(m, N, device=dev, dtype=torch.bfloat16)
    de = [torch.rand(m, E, device=dev, generator=gen) + 0.1 for _ in range(2)]
    w = Work(m, N, K, E, 1); cands = {}
    for v in DV[m]:
        try: dense(a, *ws[0], de[0], out, w, *v)
        except Exception as ex: print("EXC", m, v, repr(ex)[:300]); continue
        cands[v] = [lambda v=v, j=j: dense(a, *ws[j % 4], de[j % 2], out, w, *v) for j in range(6)]
    cands["nosum"] = [lambda v=v, j=j: dense(a, *ws[j % 4], de[j % 2], out, w, *DV[m][0], stage=1) for j in range(6)]
    r = bench(cands)
    print("dense", m, " ".join(f"{v}:{x[0]:.1f}" for v, x in r.items()))
    del cands
for m in (8,):
    a = quantize_nvfp4(torch.randn(m, K, device=dev, generator=gen))
    out = torch.empty(m, N, device=dev, dtype=torch.bfloat16)
    al = [topk_alpha(m, gen) for _ in range(24)]; de = [torch.rand(m, E, device=dev, generator=gen) + 0.1 for _ in range(2)]
    for kind, als, reps in (("routed", al, 24), ("dense", de, 8)):
        cands = {v: [lambda v=v, j=j: few(a, *ws[j % 4], als[j % len(als)], out, lists, *v) for j in range(reps)] for v in ((1,2,4),(1,4,2),(2,4,2),(2,4,1))}
        r = bench(cands)
        print(m, kind, " ".join(f"{v}:{x[0]:.1f}" for v, x in r.items()))
print("total", time.time()-t00)
