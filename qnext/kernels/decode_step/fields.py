"""Places of numbers and addresses in the tables that the step's kernels read.

Letters as everywhere: T rows, N sequences, C hidden, Hq Hkv D attention, Hk Hv K V DeltaNet,
E experts, A per token, I width, W vocabulary. An address is 0 where there is nothing.
"""

# One row of int64 for each layer.
(
    IS_ATTENTION,
    MIXER_IDX,
    IS_MOE,
    LN1,  # fp32 [C], as all norms
    LN2,
    IN_PROJ,
    IN_PROJ_SCALE,  # fp32, one for each row of an int8 matrix; as all scales
    OUT_PROJ,
    OUT_PROJ_SCALE,
    CONV,  # fp32 [width, channels]
    DECAY_RATE,  # exp(A_log), fp32 [Hv]
    DT_BIAS,
    GATED_NORM,
    Q_NORM,
    K_NORM,
    ROUTER,  # fp32 [E + 1, C]: the router, then the shared expert's gate
    EXPERTS_UP,  # [E, 2I, C]
    EXPERTS_UP_SCALE,
    EXPERTS_DOWN,  # [E, C, I]
    EXPERTS_DOWN_SCALE,
    SHARED_UP,  # the shared expert, or the dense MLP of a layer without experts
    SHARED_UP_SCALE,
    SHARED_DOWN,
    SHARED_DOWN_SCALE,
    SHARED_WIDTH,
    NUM_COLUMNS,
) = range(26)

# The table of a step.
(
    TEAM,  # counter of the team's meetings
    # Sizes.
    C,
    HQ,
    HKV,
    D,
    HK,
    HV,
    K,
    V,
    WIDTH,
    E,
    A,
    I,
    VOCAB,
    HALF_ROTARY,
    NORM_TOPK,
    EPS,  # bits of an fp32
    WEIGHT_BYTES,  # of an element of the matrices: 4, 2 (bfloat16) or 1 (int8)
    LAYOUT,  # of rows for their products, as `arrange` takes it
    # Compiled functions that a step calls by their address.
    PRODUCTS,  # for the matrices
    PRODUCTS_FLOAT,
    MIX_WINDOW,
    ATTEND_WINDOW,
    MIX_EXPERTS,
    RUN_LAYER,
    ONE_STEP,
    # Weights.
    LAYERS,
    NUM_LAYERS,
    FINAL_NORM,
    EMBEDDING,
    EMBEDDING_SCALE,
    HEAD,
    HEAD_SCALE,
    FC,  # of the MTP head; 0 in the trunk
    FC_SCALE,
    NORM_EMBEDDING,
    NORM_HIDDEN,
    COS,  # fp32 [positions, half]
    SIN,
    # Memory of the sequences.
    KEYS,  # fp32 [L, S, Hkv, D]
    VALUES,
    KV_ROWS,  # S
    PAGE_SIZE,
    CONV_STATE,  # fp32 [L, slots, channels, width - 1]
    STATES,  # fp32 [L, slots, Hv, K, V]
    WINDOW_KEYS,  # fp32 [L, slots, window, Hk, K]
    WINDOW_CHANGES,
    WINDOW_DECAYS,
    WINDOW_INPUTS,
    PENDING,  # rows of each slot's last window that its states still lack. [slots]
    NUM_SLOTS,
    HOLDS_STATES,  # 1: PENDING is this step's to clear
    MAX_WINDOW,
    # The rows of this call.
    NUM_ROWS,
    NUM_SEQS,
    # Rounds that a call takes by itself, of drafts and their verification, or of a plain step.
    MAX_STEPS,  # rounds at most
    NUM_STEPS,  # rounds taken
    NUM_DRAFTS,  # of each sequence in each round, D; a window then has Q = D + 1 rows
    DRAFT_TABLE,  # table of the draft's step
    SEEDS,  # uint64 [N]
    CUTS,  # float64 [N, 4]: temperature (0 takes the best token), top_k, top_p, min_p
    LAST_IDS,  # int64 [N]: the token that each sequence goes on from
    DRAFT_IDS,  # int64 [N, D]
    DRAFT_WEIGHTS,  # fp32 [N, D, W]: what sampled drafts were drawn from
    DRAFT_TOTALS,  # float64 [N, D]
    TARGET_WEIGHTS,  # fp32 [threads, W]
    DECIDE_ROOM,  # float64, for each thread
    WEIGH,  # address of the function
    DECIDED,  # int64 [rounds, N, Q]: the drafts that stand, then one token more; -1: no number
    COUNTS,  # int64 [rounds, N]: how many were decided
    END_IDS,  # int64: tokens after which no further round is taken
    NUM_END_IDS,
    NUM_SCORED,  # rows that get logits
    SCORED,  # which. int64
    TOKEN_IDS,  # int64 [T]
    HIDDEN_IN,  # fp32 [T, C], for the MTP head
    STARTS,  # int64 [N + 1]
    SLOTS,
    CONTEXTS,
    PAGES,  # int64 [N, PAGES_WIDTH]
    PAGES_WIDTH,
    # Results.
    HIDDEN,  # fp32 [T, C]; of rounds without drafts [rounds, T, C]
    LOGITS,  # fp32 [NUM_SCORED, W]
    BEST,  # int64 [NUM_SCORED]: the lowest id of the largest logit, -1 if none is a number
    # Room to work in. A row stride is the size rounded up to whole vectors.
    IDENTITY,  # int64: 0, 1, 2, ...
    X,  # residual rows
    NORMED,  # for each thread
    ARRANGED,  # for each thread
    FUSED,
    HEADS,
    CONVOLVED,
    SCRATCH_STATE,  # fp32 [threads, K, V]
    STATE_READ,  # fp32 [N, Hv, V]
    SCORES,  # for each thread
    PROBS,
    ROUTES,  # int64, for each thread
    EXPERT_UP,
    EXPERT_OUT,
    SHARED_HIDDEN,
    SHARED_OUT,
    BEST_VALUES,  # fp32 [threads, T]
    BEST_IDS,  # int64 [threads, T]
    STRIDE_C,
    STRIDE_FUSED,
    STRIDE_HEADS,
    STRIDE_WORK,  # of ARRANGED
    STRIDE_UP,
    STRIDE_I,
    STRIDE_SCORES,
    STRIDE_ROUTES,
    STRIDE_DECIDE,
    MAX_ROWS,
    NUM_FIELDS,
) = range(113)
