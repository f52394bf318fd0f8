"""Time tile choices of the expert kernels on one GPU: SHAPE x T x format, gate_up and down one after the other."""
import itertools, json, os, sys, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing as mp
import torch
from functools import partial
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from _timing import copy_bandwidth, graph_time
from sm12x_compile.lowering.triton.experts import run_experts
from sm12x_compile.lowering.triton.expert_tiles import ExpertTiles, Plan
from sm12x_compile.ops.mxfp4 import dequantize_fp4

E, K, D, I = 128, 8, 2048, 768

def weights(fmt, real=True):
    if fmt == "bf16":
        mk = (lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16) * s[-1] ** -0.5) if real else (lambda *s: torch.empty(s, device="cuda", dtype=torch.bfloat16))
        return dict(w13=mk(E, 2 * I, D), w2=mk(E, D, I), format="bf16")
    b = lambda lo, hi, *s: torch.randint(lo, hi, s, device="cuda", dtype=torch.uint8)
    return dict(w13=b(0, 256, E, 2 * I, D // 2), w2=b(0, 256, E, D, I // 2), w13_scale=b(118, 123, E, 2 * I, D // 32), w2_scale=b(118, 123, E, D, I // 32), format="mxfp4")

def inputs(T):
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    w, ids = torch.randn(T, E, device="cuda").softmax(-1).topk(K)
    return x, ids, w

def warm(task):
    fmt, T, sort, gu, dn = task
    try:
        run_experts(Plan(sort, ExpertTiles(*gu), ExpertTiles(*dn)), *inputs(T), **weights(fmt, False))
        torch.cuda.synchronize()
        return None
    except Exception as e:
        return f"{task} {type(e).__name__} {str(e)[:150]}"

def tasks():
    out = []
    def add(fmt, T, sort, bm, gus, dns):
        gus = [(bm, *g) for g in gus]; dns = [(bm, *d) for d in dns]
        for g in gus: out.append((fmt, T, sort, g, dns[0]))
        for d in dns[1:]: out.append((fmt, T, sort, gus[0], d))
    F, S = False, True
    gu = [(32,128,4,4,F),(64,128,4,4,F),(32,128,4,5,F),(64,128,8,4,F),(32,256,4,3,F),(64,256,8,3,F),(64,128,4,4,S)]
    dn = [(64,128,4,4,F),(32,128,4,4,F),(128,128,4,4,F),(64,256,4,3,F),(128,128,8,4,F),(64,128,4,5,F),(64,128,4,4,S)]
    add("mxfp4", 1, F, 16, gu, dn)
    add("mxfp4", 16, S, 16, gu, dn)
    add("mxfp4", 256, S, 16, [(64,128,4,4,F)], dn[:1])
    add("mxfp4", 256, S, 32, [(64,128,4,4,S),(64,128,4,3,S),(64,64,4,4,S),(128,64,8,3,S),(64,128,4,4,F),(128,128,8,3,S),(64,128,8,4,F)],[(64,128,4,4,S),(128,128,8,3,S),(128,128,4,3,F),(64,128,4,4,F),(128,64,4,4,S)])
    add("mxfp4", 256, S, 64, [(64,128,4,3,S),(64,64,4,4,S)],[(64,128,4,3,S),(128,64,4,4,S)])
    add("mxfp4", 4096, S, 128, [(64,64,8,3,F),(64,128,8,3,F),(128,64,8,3,F),(64,128,8,2,F),(64,64,4,3,S),(128,64,8,4,F)],[(128,64,8,3,F),(128,128,8,3,F),(128,128,8,2,F),(256,64,8,3,F),(128,64,8,4,F)])
    add("mxfp4", 4096, S, 64, [(64,64,4,4,S),(64,128,4,3,S),(128,64,8,3,S),(64,64,4,4,F)],[(128,64,4,4,S),(128,64,4,4,F),(64,128,4,3,S)])
    add("mxfp4", 4096, S, 256, [(64,64,8,3,F)],[(128,64,8,3,F)])
    return out

def reference(x, ids, p, w):
    # bf16 grouped by loop over experts in fp32
    w13, w2 = w["w13"], w["w2"]
    out = torch.zeros(x.shape, device="cuda", dtype=torch.float32)
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        a, b = (w13[e].float(), w2[e].float()) if w["format"] == "bf16" else (dequantize_fp4("m", w13[e], w["w13_scale"][e], "mxfp4"), dequantize_fp4("m", w2[e], w["w2_scale"][e], "mxfp4"))
        h = x[t].float() @ a.T
        h = torch.nn.functional.silu(h[:, :I]) * h[:, I:]
        out.index_add_(0, t, (h @ b.T) * p[t, j, None])
    return out

def main():
    todo = tasks()
    sys.path.insert(0, "tests/lowering")
    from dequantise_kernel import dequantised
    packed = torch.arange(256, device="cuda").to(torch.uint8)[None, :].expand(256, 256).reshape(-1, 64).contiguous()
    codes = torch.arange(256, device="cuda").to(torch.uint8)[:, None].expand(256, 16).reshape(-1, 4).contiguous()
    want = dequantize_fp4("t", packed, codes, "mxfp4")
    for dt in (torch.bfloat16, torch.float32):
        try:
            got = dequantised(packed, codes, dt).float()
            n = ~want.isnan()
            print("exact", dt, torch.equal(got.isnan(), want.isnan()), torch.equal(got.view(torch.int32)[n], want.view(torch.int32)[n]), int((got.view(torch.int32)[n] != want.view(torch.int32)[n]).sum()))
        except Exception as e: print("exact failed", type(e).__name__, str(e)[:300])
    t0 = time.time()
    with ProcessPoolExecutor(14, mp_context=mp.get_context("spawn")) as pool:
        for r in pool.map(warm, todo):
            if r: print(r, flush=True)
    print("compiled", len(todo), "in", round(time.time() - t0), flush=True)
    torch.manual_seed(0); torch.set_grad_enabled(False)
    bw = copy_bandwidth(); print("copy TB/s", round(bw / 1e12, 3))
    rows = []
    for (fmt, T), group in itertools.groupby(todo, key=lambda t: t[:2]):
        sets = [weights(fmt) for _ in range(4)]; ins = [inputs(T) for _ in range(4)]
        ref = reference(*ins[0], sets[0])
        hit = sum(len(i[1].unique()) for i in ins) / 4
        per = sum(t.numel() * t.element_size() for t in sets[0].values() if isinstance(t, torch.Tensor)) / E
        floor = hit * per / bw * 1e3
        for task in group:
            _, _, sort, gu, dn = task
            plan = Plan(sort, ExpertTiles(*gu), ExpertTiles(*dn))
            try:
                out = run_experts(plan, *ins[0], **sets[0])
                err = float((out.float() - ref).norm() / ref.norm())
                ms = graph_time([partial(run_experts, plan, *i, **w) for i, w in zip(ins, sets)], replays=8, warmup=1) * 1e3
            except Exception as e:
                print("fail", task, type(e).__name__, str(e)[:100]); continue
            rows.append((fmt, T, sort, gu, dn, round(ms, 4), round(floor, 4), err))
            print(fmt, T, "sort" if sort else "pair", gu, dn, f"{ms:.4f} floor {floor:.4f} {floor/ms:.2f}", "" if err < 8e-3 else f"WRONG {err:.2e}", flush=True)
        del sets
    if os.environ.get("OUT"): json.dump(rows, open(os.environ["OUT"] + "/sweep.json", "w"))

if __name__ == "__main__":
    main()
