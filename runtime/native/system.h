/* What llama_onnx.c needs from the operating system: Windows, or POSIX with dlopen. */
#ifndef LLAMA_ONNX_SYSTEM_H
#define LLAMA_ONNX_SYSTEM_H

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define COBJMACROS
#include <windows.h>
#include <dxgi.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>
#endif

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char own_address = 0; /* an address in this library or the program it is linked into */

#ifdef _WIN32
typedef HMODULE module;
typedef SRWLOCK mutex;
#define ORT_LIBRARY "onnxruntime.dll"
#define GENAI_LIBRARY "onnxruntime-genai.dll"
#define SEPARATOR "\\"
#define LONG_PATH 200 /* longer paths get the prefix that removes the limit of 260 characters */

static void mutex_init(mutex *m) { InitializeSRWLock(m); }
static void mutex_lock(mutex *m) { AcquireSRWLockExclusive(m); }
static void mutex_unlock(mutex *m) { ReleaseSRWLockExclusive(m); }
static void mutex_destroy(mutex *m) { (void)m; }

/* NULL if `text` is not UTF-8 or there is no memory. */
static wchar_t *to_wide(const char *text) {
    int size = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, NULL, 0);
    wchar_t *out = size ? malloc((size_t)size * sizeof *out) : NULL;
    if (out) MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text, -1, out, size);
    return out;
}

static char *to_utf8(const wchar_t *text) {
    int size = WideCharToMultiByte(CP_UTF8, 0, text, -1, NULL, 0, NULL, NULL);
    char *out = size ? malloc((size_t)size) : NULL;
    if (out) WideCharToMultiByte(CP_UTF8, 0, text, -1, out, size, NULL, NULL);
    return out;
}

/* The full path without a trailing separator, ready to be joined with a name; NULL if `path` is not
 * UTF-8. */
static char *absolute(const char *path) {
    char *out = NULL;
    wchar_t *given = to_wide(path);
    DWORD size = given ? GetFullPathNameW(given, 0, NULL, NULL) : 0;
    wchar_t *full = size ? calloc(size + 8, sizeof *full) : NULL;
    if (full) {
        wchar_t *start = full + 8; /* leaves room for the prefix */
        size = GetFullPathNameW(given, size, start, NULL);
        while (size > 3 && start[size - 1] == L'\\') start[--size] = 0;
        if (size >= LONG_PATH && start[0] == L'\\' && start[1] == L'\\' && start[2] != L'?') {
            start -= 6; /* \\server\share -> \\?\UNC\server\share */
            memcpy(start, L"\\\\?\\UNC", 7 * sizeof *start);
        } else if (size >= LONG_PATH && start[0] != L'\\') {
            start -= 4;
            memcpy(start, L"\\\\?\\", 4 * sizeof *start);
        }
        out = to_utf8(start);
    }
    free(full);
    free(given);
    return out;
}

static FILE *open_file(const char *path) {
    wchar_t *name = to_wide(path);
    FILE *file = name ? _wfopen(name, L"rb") : NULL;
    free(name);
    return file;
}

/* Loads a library. Windows looks for its dependencies beside it, then in System32, but not in the
 * program's folder, the current folder or PATH. */
static module load_module(const char *path) {
    wchar_t *name = to_wide(path);
    module loaded = NULL;
    if (name) {
        loaded = LoadLibraryExW(name, NULL,
                                LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32);
    }
    free(name);
    return loaded;
}

static void unload_module(module m) { FreeLibrary(m); }

/* The loaded module that another library would get by `name`; NULL if there is none. */
static module loaded_module(const char *name) {
    wchar_t *wide = to_wide(name);
    module found = wide ? GetModuleHandleW(wide) : NULL;
    free(wide);
    return found;
}

static void *symbol(module m, const char *name) {
    FARPROC found = GetProcAddress(m, name);
    void *out;
    memcpy(&out, &found, sizeof out);
    return out;
}

static char *module_path(module m) {
    wchar_t name[32768];
    DWORD size = GetModuleFileNameW(m, name, 32768);
    return size && size < 32768 ? to_utf8(name) : NULL;
}

static char *own_path(void) {
    module self;
    DWORD how =
        GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    return GetModuleHandleExW(how, (LPCWSTR)&own_address, &self) ? module_path(self) : NULL;
}

static void load_error(char *out, size_t size) {
    DWORD code = GetLastError();
    if (code == ERROR_MOD_NOT_FOUND) {
        snprintf(out, size, "a library that it needs is missing, usually Microsoft's Visual C++ "
                            "Redistributable: install it");
    } else if (code == ERROR_BAD_EXE_FORMAT) {
        snprintf(out, size, "it is damaged or built for a different kind of processor");
    } else {
        snprintf(out, size, "Windows error %lu", (unsigned long)code);
    }
}

static void telemetry_off(void) {
    typedef int(__cdecl * put)(const wchar_t *, const wchar_t *);
    const wchar_t *name = L"ORT_DISABLE_TELEMETRY";
    if (GetEnvironmentVariableW(name, NULL, 0)) return;
    SetEnvironmentVariableW(name, L"1");
    /* The libraries' C runtime keeps its own copy if it has already started. */
    module crt = GetModuleHandleW(L"ucrtbase.dll");
    void *found = crt ? symbol(crt, "_wputenv_s") : NULL;
    put put_environment;
    memcpy(&put_environment, &found, sizeof found);
    if (put_environment) put_environment(name, L"1");
}

static bool telemetry_wanted(void) {
    wchar_t value[2];
    return GetEnvironmentVariableW(L"ORT_DISABLE_TELEMETRY", value, 2) == 1 && value[0] == L'0';
}

/* Writes the name of the first graphics device with Direct3D 12, emulations excluded. */
static bool find_device(char *name, size_t size) {
    typedef HRESULT(WINAPI * create_factory)(REFIID, void **);
    typedef HRESULT(WINAPI * create_device)(IUnknown *, int, REFIID, void **);
    static const IID factory_iid = {
        0x770aae78, 0xf26f, 0x4dba, {0xa8, 0x29, 0x25, 0x3c, 0x83, 0xd1, 0xb3, 0x87}};
    static const IID device_iid = {
        0x189819f1, 0x1db6, 0x4b57, {0xbe, 0x54, 0x18, 0x21, 0x33, 0x9b, 0x85, 0xf7}};
    const int feature_level_11_0 = 0xb000;
    module dxgi = LoadLibraryExW(L"dxgi.dll", NULL, LOAD_LIBRARY_SEARCH_SYSTEM32);
    module d3d12 = LoadLibraryExW(L"d3d12.dll", NULL, LOAD_LIBRARY_SEARCH_SYSTEM32);
    void *factory_symbol = dxgi ? symbol(dxgi, "CreateDXGIFactory1") : NULL;
    void *device_symbol = d3d12 ? symbol(d3d12, "D3D12CreateDevice") : NULL;
    create_factory new_factory;
    create_device new_device;
    IDXGIFactory1 *factory;
    IDXGIAdapter1 *adapter;
    bool found = false;
    memcpy(&new_factory, &factory_symbol, sizeof factory_symbol);
    memcpy(&new_device, &device_symbol, sizeof device_symbol);
    if (!new_factory || !new_device) return false;
    if (FAILED(new_factory(&factory_iid, (void **)&factory))) return false;
    for (UINT i = 0; !found && IDXGIFactory1_EnumAdapters1(factory, i, &adapter) == S_OK; i++) {
        DXGI_ADAPTER_DESC1 about;
        found = SUCCEEDED(IDXGIAdapter1_GetDesc1(adapter, &about)) &&
                !(about.Flags & DXGI_ADAPTER_FLAG_SOFTWARE) &&
                SUCCEEDED(new_device((IUnknown *)adapter, feature_level_11_0, &device_iid, NULL));
        char *text = found ? to_utf8(about.Description) : NULL;
        if (text) snprintf(name, size, "%s", text);
        free(text);
        IDXGIAdapter1_Release(adapter);
    }
    IDXGIFactory1_Release(factory);
    return found;
}

#else
typedef void *module;
typedef pthread_mutex_t mutex;
#define ORT_LIBRARY "libonnxruntime.so.1"
#define GENAI_LIBRARY "libonnxruntime-genai.so"
#define SEPARATOR "/"

static void mutex_init(mutex *m) { pthread_mutex_init(m, NULL); }
static void mutex_lock(mutex *m) { pthread_mutex_lock(m); }
static void mutex_unlock(mutex *m) { pthread_mutex_unlock(m); }
static void mutex_destroy(mutex *m) { pthread_mutex_destroy(m); }
static char *absolute(const char *path) { return strdup(path); }
static FILE *open_file(const char *path) { return fopen(path, "rb"); }
static module load_module(const char *path) { return dlopen(path, RTLD_NOW | RTLD_LOCAL); }
static void unload_module(module m) { dlclose(m); }
static void *symbol(module m, const char *name) { return dlsym(m, name); }
static void telemetry_off(void) { setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

static bool telemetry_wanted(void) {
    const char *value = getenv("ORT_DISABLE_TELEMETRY");
    return value && strcmp(value, "0") == 0;
}

static module loaded_module(const char *name) {
    module found = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (found) dlclose(found);
    return found;
}

static char *address_path(const void *address) {
    Dl_info info;
    return dladdr(address, &info) && info.dli_fname ? strdup(info.dli_fname) : NULL;
}

static char *module_path(module m) { return address_path(dlsym(m, "OrtGetApiBase")); }
static char *own_path(void) { return address_path(&own_address); }

static void load_error(char *out, size_t size) {
    const char *text = dlerror();
    snprintf(out, size, "%s", text ? text : "the system gives no reason");
}

/* DirectML does not exist here; tests define TEST_DEVICE to run the code that uses it. */
static bool find_device(char *name, size_t size) {
#ifdef TEST_DEVICE
    return snprintf(name, size, "%s", TEST_DEVICE) > 0;
#else
    return snprintf(name, size, "none") < 0;
#endif
}
#endif

#endif
