/* d3d12.dll in front of Wine 10's own, a renamed copy called wd3d12.dll. It adds what DirectML expects
 * of Windows: D3D12GetInterface, EnumerateMetaCommands, and one device for each process. */
#include <windows.h>
#include <d3d12.h>
#include <stdlib.h>

enum { CREATE_COMPUTE_PIPELINE_STATE = 11, ENUMERATE_META_COMMANDS = 59 }; /* slots of ID3D12Device5 */
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
        const char *given = getenv("LOSE_DEVICE_AFTER");
        if (given) {
            pipelines_left = atol(given);
            void *found = replace_method(device, CREATE_COMPUTE_PIPELINE_STATE, (void *)lose_device);
            wine_pipeline = (create_pipeline)found;
        }
    }
    return device->lpVtbl->QueryInterface(device, iid, out);
}

HRESULT WINAPI get_interface(const GUID *class_id, const GUID *iid, void **out) {
    (void)class_id, (void)iid;
    if (out) *out = NULL;
    return E_NOINTERFACE;
}
