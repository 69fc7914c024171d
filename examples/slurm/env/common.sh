# Sourced by the files for a kind of node: what helps on all of them, each variable with its reason.

# `python -m` would put the working directory first on the path: a clone's kernels/ and tools/ before installed
# packages.
export PYTHONSAFEPATH=1
# A rank that is killed must not take the last lines of its log along.
export PYTHONUNBUFFERED=1
# Otherwise every rank starts a thread for each core of the machine. More pays when the optimizer runs on the CPU.
export OMP_NUM_THREADS=1

# Ranks sign with it what their watchdogs tell each other (docs/trusted_files.md); another one for every start.
REFLECTRON_RUN_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export REFLECTRON_RUN_SECRET

# megatron-core puts the communication of tensor parallelism before matrix products that can hide it, and relies on
# the GPU to start them in that order, which a single hardware queue guarantees. Needed up to Hopper, not from
# Blackwell on.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Packs differ in length from step to step; segments that grow keep them from cutting the memory into pieces. (New
# releases of torch call it PYTORCH_ALLOC_CONF and still read this name.)
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# Says why a communicator could not be made; silent otherwise. INFO shows the rings, the HCAs and whether GPUDirect
# works.
export NCCL_DEBUG=WARN
# When a collective hangs, every rank writes down the last ones it started (torch's flight recorder), where they can
# be looked at after the job instead of in the nodes' /tmp; `torchfrtrace` finds the rank that is behind. Older
# releases of torch name the first TORCH_NCCL_TRACE_BUFFER_SIZE and the last TORCH_NCCL_DEBUG_INFO_TEMP_FILE.
export TORCH_FR_BUFFER_SIZE=2000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.collectives_rank_
# Left alone: TORCH_NCCL_ASYNC_ERROR_HANDLING, whose default (3) ends a rank after a failed collective, and
# TORCH_NCCL_AVOID_RECORD_STREAMS, which became the default and now only warns.

# Of the site; NCCL finds them by itself on most machines. Uncomment when `NCCL_DEBUG=INFO` shows a wrong choice.
# - The interface that nodes reach each other by, `=` for exactly this name, when a bridge or a second network is first:
# export NCCL_SOCKET_IFNAME==eth0
# - megatron-core makes gloo groups beside those of NCCL; gloo listens where the node's own name leads, which Debian's
#   /etc/hosts makes 127.0.1.1:
# export GLOO_SOCKET_IFNAME=eth0
# - RoCE with NCCL before 2.21 only, which did not look for the RoCE v2 address itself (`show_gids` lists them):
# export NCCL_IB_GID_INDEX=3
