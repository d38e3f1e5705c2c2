/* d3d12.dll in front of Wine 10's own, a renamed copy called wd3d12.dll. It adds what DirectML expects
 * of Windows: D3D12GetInterface, EnumerateMetaCommands, and one device for each process. */
#include <windows.h>
#include <d3d12.h>
#include <stdlib.h>

/* Slots of ID3D12Device5 and ID3D12GraphicsCommandList. */
enum { CREATE_COMPUTE_PIPELINE_STATE = 11, CREATE_COMMAND_LIST = 12, ENUMERATE_META_COMMANDS = 59 };
enum { DISPATCH = 14 };
enum { DEVICE_REMOVED = (int)0x887A0005 };

/* Wine's is a stub that fails. Without meta commands, DirectML uses its own shaders. */
static HRESULT WINAPI no_meta_commands(void *self, UINT *count, void *descriptions) {
    (void)self, (void)descriptions;
    if (count) *count = 0;
    return S_OK;
}

static void *replace_method(IUnknown *object, int slot, void *method) {
    void **entry = &(*(void ***)object)[slot], *original = *entry;
    DWORD before;
    VirtualProtect(entry, sizeof *entry, PAGE_READWRITE, &before);
    *entry = method;
    VirtualProtect(entry, sizeof *entry, before, &before);
    return original;
}

typedef HRESULT (WINAPI *create_pipeline)(void *, const void *, REFIID, void **);
static create_pipeline wine_pipeline;
static long pipelines_left;

/* A fault to plant: the device is gone after LOSE_DEVICE_AFTER shaders. */
static HRESULT WINAPI lose_device(void *self, const void *about, REFIID iid, void **out) {
    if (InterlockedDecrement(&pipelines_left) < 0) return DEVICE_REMOVED;
    return wine_pipeline(self, about, iid, out);
}

/* Another: of the device's shaders, every SKIP_DISPATCH-th does not run, and nothing reports that. */
typedef void (WINAPI *dispatch)(void *, UINT, UINT, UINT);
typedef HRESULT (WINAPI *create_list)(void *, UINT, int, void *, void *, REFIID, void **);
static dispatch wine_dispatch;
static create_list wine_list;
static long skipped_one_in, dispatches;

static void WINAPI skip_some(void *self, UINT x, UINT y, UINT z) {
    if (InterlockedIncrement(&dispatches) % skipped_one_in) wine_dispatch(self, x, y, z);
}

static HRESULT WINAPI spoil_list(void *self, UINT mask, int type, void *allocator, void *state,
                                 REFIID iid, void **out) {
    HRESULT result = wine_list(self, mask, type, allocator, state, iid, out);
    if (!FAILED(result) && out && !wine_dispatch) { /* all lists have the same methods */
        wine_dispatch = (dispatch)replace_method(*out, DISPATCH, (void *)skip_some);
    }
    return result;
}

static void plant_faults(IUnknown *device) {
    const char *pipelines = getenv("LOSE_DEVICE_AFTER"), *dispatched = getenv("SKIP_DISPATCH");
    if (pipelines) {
        pipelines_left = atol(pipelines);
        void *found = replace_method(device, CREATE_COMPUTE_PIPELINE_STATE, (void *)lose_device);
        wine_pipeline = (create_pipeline)found;
    }
    if (dispatched) {
        skipped_one_in = atol(dispatched);
        void *found = replace_method(device, CREATE_COMMAND_LIST, (void *)spoil_list);
        wine_list = (create_list)found;
    }
}

/* On Windows an adapter has one device in a process, so ONNX Runtime lets sessions share buffers.
 * Wine makes a new one at each call, on which the buffers of another are invalid. */
HRESULT WINAPI create_device(IUnknown *adapter, D3D_FEATURE_LEVEL level, REFIID iid, void **out) {
    static HRESULT (WINAPI *wine)(IUnknown *, D3D_FEATURE_LEVEL, REFIID, void **);
    static IUnknown *device;
    static const IID unknown = {0, 0, 0, {0xc0, 0, 0, 0, 0, 0, 0, 0x46}};
    if (!wine) {
        FARPROC found = GetProcAddress(LoadLibraryA("wd3d12.dll"), "D3D12CreateDevice");
        __builtin_memcpy(&wine, &found, sizeof wine);
    }
    if (!out) return wine(adapter, level, iid, NULL);
    if (!device) {
        HRESULT result = wine(adapter, level, &unknown, (void **)&device);
        if (FAILED(result)) return result;
        replace_method(device, ENUMERATE_META_COMMANDS, (void *)no_meta_commands);
        plant_faults(device);
    }
    return device->lpVtbl->QueryInterface(device, iid, out);
}

HRESULT WINAPI get_interface(const GUID *class_id, const GUID *iid, void **out) {
    (void)class_id, (void)iid;
    if (out) *out = NULL;
    return E_NOINTERFACE;
}
