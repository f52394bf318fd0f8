"""The names of torch's operations, by what they do to the rows of their operands."""

from __future__ import annotations

# Element by element, with broadcasting; tensor operands must not extend over the rows.
ELEMENTWISE = frozenset(
    {
        "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide",
        "remainder", "fmod", "pow", "float_power", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
        "sqrt", "rsqrt", "square", "abs", "absolute", "neg", "negative", "sign", "sgn", "reciprocal", "sin",
        "cos", "tan", "tanh", "sigmoid", "relu", "relu6", "silu", "gelu", "mish", "elu", "selu", "celu",
        "leaky_relu", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "logsigmoid",
        "tanhshrink", "softshrink", "hardshrink", "threshold", "erf", "erfc", "clamp", "clamp_min",
        "clamp_max", "clip", "minimum", "maximum", "fmin", "fmax", "where", "masked_fill", "lerp",
        "addcmul", "addcdiv", "floor", "ceil", "round", "trunc", "frac", "isnan", "isinf", "isfinite",
        "nan_to_num", "eq", "ne", "not_equal", "lt", "less", "le", "less_equal", "gt", "greater", "ge",
        "greater_equal", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and",
        "bitwise_or", "bitwise_xor", "bitwise_not", "logaddexp", "atan", "atan2", "asin", "acos", "sinh",
        "cosh", "xlogy", "float", "double", "half", "bfloat16", "long", "int", "bool", "to", "type",
        "type_as", "clone", "contiguous", "detach", "copysign", "hypot", "zeros_like", "ones_like",
        "full_like", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__",
        "__rtruediv__", "__div__", "__rdiv__", "__rmod__", "__pow__", "__floordiv__", "__rfloordiv__",
        "__mod__", "__rpow__", "__neg__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__",
        "__and__", "__or__", "truediv", "floordiv", "mod", "and_", "or_", "invert", "iadd", "imul", "isub",
        "itruediv",
    }
)
CASTS = frozenset(["float", "double", "half", "bfloat16", "to", "type", "type_as"])
UNCHANGED = CASTS | frozenset(["contiguous", "detach", "long", "int", "bool"])
CASTS_OF_INDEX = frozenset(["to", "long", "int", "clone", "type"])
PRODUCTS = frozenset(["mul", "multiply", "__mul__", "__rmul__", "imul"])
# Along a dimension that must not be that of the rows: name -> position of the argument `dim`.
ALONG = {
    "softmax": 1, "log_softmax": 1, "softmin": 1, "sum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1,
    "any": 1, "all": 1, "prod": 1, "std": 1, "var": 1, "logsumexp": 1, "argmax": 1, "argmin": 1, "cumsum": 1,
    "cumprod": 1, "chunk": 2, "split": 2, "unbind": 1, "narrow": 1, "select": 1, "topk": 2, "sort": 1, "argsort": 1,
    "squeeze": 1, "unsqueeze": 1, "glu": 1, "flip": 1, "norm": 2, "vector_norm": 2, "normalize": 2,
    "linalg_vector_norm": 2,
}  # fmt: skip
DEFAULT_DIM = {"chunk": 0, "split": 0, "unbind": 0, "topk": -1, "sort": -1, "argsort": -1, "glu": -1, "normalize": 1}
# These mean all elements if no dimension is given: then they mix rows.
REDUCTIONS = frozenset(["sum", "mean", "any", "all", "count_nonzero"])
NOTHING = frozenset(["dropout", "dropout1d", "alpha_dropout", "feature_alpha_dropout"])
