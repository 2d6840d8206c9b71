# shellcheck shell=bash
# NCCL over Google's GPUDirect-TCPXO, on nodes of type A3 Mega: source env/tcpxo.sh FOLDER GPUS
# FOLDER is `tcpxo` of the cluster's file, GPUS the number of this job's GPUs on this node. Variables that the job has already
# stay. The others come from FOLDER/nccl-env-profile.sh, where it exists, except three (protocols, tuner, checker) that AI2 sets
# after it; what the profile does not set has the values of OLMo-core (olmo_core/distributed/utils.py, augusta).
if ! [ -d "$1" ]; then
    if [ "${BEAKER_REPLICA_COUNT:-1}" -gt 1 ]; then
        echo "error: tcpxo = \"$1\" in the cluster's file: this node has no such folder, so its GPUs would reach other nodes slowly;" \
            "next: correct it, or tcpxo = \"\"" >&2
        exit 1
    fi
    echo "[launch] this node has no $1: NCCL is not set up for other nodes" >&2
else
    declare -A sft_given=()
    for sft_name in "${!NCCL_@}" "${!CUDA_VISIBLE_@}"; do sft_given[$sft_name]="${!sft_name}"; done
    export LD_LIBRARY_PATH="$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" NCCL_LIB_DIR="$1"
    if [ -f "$1/nccl-env-profile.sh" ]; then
        set +u # the profile may read variables that are not set
        # shellcheck disable=SC1091
        source "$1/nccl-env-profile.sh"
        set -u
    fi
    export NCCL_PROTO=Simple,LL128
    export NCCL_TUNER_CONFIG_PATH="$1/a3plus_tuner_config_ll128.textproto"
    export NCCL_SHIMNET_GUEST_CONFIG_CHECKER_CONFIG_FILE="$1/a3plus_guest_config_ll128.textproto"
    for sft_pair in \
        NCCL_CROSS_NIC=0 NCCL_MIN_NCHANNELS=4 NCCL_BUFFSIZE=8388608 NCCL_NET_GDR_LEVEL=PIX \
        NCCL_P2P_NET_CHUNKSIZE=524288 NCCL_P2P_PCI_CHUNKSIZE=524288 NCCL_P2P_NVL_CHUNKSIZE=1048576 \
        NCCL_NVLSTREE_MAX_CHUNKSIZE=131072 NCCL_USE_SNAP=1 NCCL_TUNER_PLUGIN=libnccl-tuner.so \
        NCCL_SOCKET_IFNAME=enp0s12 NCCL_DEBUG_SUBSYS=INIT,NET \
        NCCL_FASTRAK_CTRL_DEV=enp0s12 \
        NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0 \
        NCCL_FASTRAK_NUM_FLOWS=2 NCCL_FASTRAK_ENABLE_CONTROL_CHANNEL=0 NCCL_FASTRAK_USE_SNAP=1 \
        NCCL_FASTRAK_ENABLE_HOTPATH_LOGGING=0 NCCL_FASTRAK_USE_LLCM=1 \
        NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices \
        NCCL_FASTRAK_PLUGIN_ACCEPT_TIMEOUT_MS=1800000 \
        "CUDA_VISIBLE_DEVICES=$(seq -s, 0 $(($2 - 1)))"; do # 30 minutes: as long as the ranks wait for each other
        sft_name="${sft_pair%%=*}"
        [ -n "${!sft_name:-}" ] || export "${sft_pair?}"
    done
    for sft_name in "${!sft_given[@]}"; do export "$sft_name=${sft_given[$sft_name]}"; done
    echo "[launch] NCCL uses GPUDirect-TCPXO of $1"
fi
