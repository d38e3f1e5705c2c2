# Runs a Windows program inside the root, with a screen that nobody sees: Wine's Vulkan needs one.
export HOME=/root WINEPREFIX=/prefix WINEDEBUG=${WINEDEBUG:--all} VKD3D_DEBUG=${VKD3D_DEBUG:-none}
export WINEDLLOVERRIDES="d3d12=n;mscoree,mshtml=" ORT_DISABLE_TELEMETRY=1 LC_ALL=C.UTF-8
cd /work
exec xvfb-run --auto-servernum --server-args="-screen 0 640x480x24" wine "$@"
