/* What llama_onnx.c needs from the operating system: Windows, or POSIX with dlopen. */
#ifndef LLAMA_ONNX_SYSTEM_H
#define LLAMA_ONNX_SYSTEM_H

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define COBJMACROS
#include <windows.h>
#include <dxgi.h>
#include <io.h>
#else
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#endif

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What an entry of a folder is. */
typedef enum {
    ENTRY_FILE,
    ENTRY_FOLDER,
    ENTRY_LINK, /* a link that leads out of the package, to nothing, or to a folder */
    ENTRY_OTHER /* a device, a pipe, a socket */
} entry_kind;

/* Receives an entry of a folder; returns whether to continue. */
typedef bool (*entry_visitor)(void *user, const char *name, entry_kind kind);

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

/* Opens a regular file for reading; NULL for anything else. */
static FILE *open_file(const char *path) {
    wchar_t *name = to_wide(path);
    FILE *file = name ? _wfopen(name, L"rb") : NULL;
    free(name);
    if (file && GetFileType((HANDLE)_get_osfhandle(_fileno(file))) != FILE_TYPE_DISK) {
        fclose(file);
        return NULL;
    }
    return file;
}

/* -1 if it cannot be found out. */
static int64_t file_size(FILE *file) { return _filelengthi64(_fileno(file)); }

static entry_kind entry_of(const WIN32_FIND_DATAW *entry) {
    /* The tags of symbolic links and junctions; other reparse points are files, such as those that
     * OneDrive has not downloaded yet. */
    bool link = entry->dwFileAttributes & FILE_ATTRIBUTE_REPARSE_POINT &&
                entry->dwReserved0 & 0x20000000;
    if (link) return ENTRY_LINK;
    if (entry->dwFileAttributes & FILE_ATTRIBUTE_DEVICE) return ENTRY_OTHER;
    return entry->dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY ? ENTRY_FOLDER : ENTRY_FILE;
}

/* Calls `visit` for each entry of the folder `path`. Returns false if the folder cannot be read or
 * `visit` returned false. `root` is the package's folder. */
static bool list_folder(const char *root, const char *path, entry_visitor visit, void *user) {
    WIN32_FIND_DATAW entry;
    size_t size = strlen(path) + 3;
    char *pattern = malloc(size);
    if (pattern) snprintf(pattern, size, "%s\\*", path);
    wchar_t *wide = pattern ? to_wide(pattern) : NULL;
    HANDLE found = wide ? FindFirstFileW(wide, &entry) : INVALID_HANDLE_VALUE;
    bool sound = found != INVALID_HANDLE_VALUE, more = sound;
    (void)root;
    while (sound && more) {
        char *name = to_utf8(entry.cFileName);
        sound = name && (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 ||
                         visit(user, name, entry_of(&entry)));
        free(name);
        more = FindNextFileW(found, &entry);
    }
    if (found != INVALID_HANDLE_VALUE) FindClose(found);
    free(wide);
    free(pattern);
    return sound;
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

static double now(void) {
    LARGE_INTEGER ticks, frequency;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&frequency);
    return (double)ticks.QuadPart / (double)frequency.QuadPart;
}

static FILE *create_file(const char *path) {
    wchar_t *name = to_wide(path);
    FILE *file = name ? _wfopen(name, L"wb") : NULL;
    free(name);
    return file;
}

/* Gives the file `from` the name `to`, in place of the file that has it. */
static bool replace_file(const char *from, const char *to) {
    wchar_t *old = to_wide(from), *name = to_wide(to);
    bool done = old && name &&
                MoveFileExW(old, name, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
    free(old);
    free(name);
    return done;
}

static void remove_file(const char *path) {
    wchar_t *name = to_wide(path);
    if (name) DeleteFileW(name);
    free(name);
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

/* The full path, so that a program may change its folder; NULL if there is no memory. */
static char *absolute(const char *path) {
    char *here = *path == '/' ? NULL : getcwd(NULL, 0);
    if (!here) return strdup(path);
    size_t size = strlen(here) + strlen(path) + 2;
    char *out = malloc(size);
    if (out) snprintf(out, size, "%s/%s", here, path);
    free(here);
    return out;
}

/* Opens a regular file for reading; NULL for anything else. Without O_NONBLOCK, opening a pipe would
 * wait for its writer. */
static FILE *open_file(const char *path) {
    struct stat about;
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    bool regular = file >= 0 && fstat(file, &about) == 0 && S_ISREG(about.st_mode);
    FILE *opened = regular ? fdopen(file, "rb") : NULL;
    if (file >= 0 && !opened) close(file);
    return opened;
}

/* -1 if it cannot be found out. */
static int64_t file_size(FILE *file) {
    struct stat about;
    return fstat(fileno(file), &about) == 0 ? (int64_t)about.st_size : -1;
}

static bool starts_with(const char *path, const char *folder) {
    size_t size = strlen(folder);
    return strncmp(path, folder, size) == 0 && path[size] == '/';
}

/* Whether the file that `path` leads to is in the folder `root`, or among the blobs of the hub's
 * cache: models--OWNER--NAME/snapshots/COMMIT/FILE is a link to ../../blobs/HASH. */
static bool leads_inside(const char *root, const char *path) {
    char *folder = realpath(root, NULL), *file = realpath(path, NULL);
    bool inside = folder && file && starts_with(file, folder);
    char *commit = folder ? strrchr(folder, '/') : NULL;
    if (!inside && file && commit) {
        const size_t part = strlen("/snapshots");
        *commit = 0;
        size_t size = strlen(folder);
        if (size > part && strcmp(folder + size - part, "/snapshots") == 0) {
            folder[size - part] = 0;
            const char *model = strrchr(folder, '/');
            inside = model && strncmp(model, "/models--", 9) == 0 && starts_with(file, folder) &&
                     strncmp(file + size - part, "/blobs/", 7) == 0;
        }
    }
    free(folder);
    free(file);
    return inside;
}

static entry_kind entry_of(const char *root, const char *path) {
    struct stat about;
    if (lstat(path, &about) != 0) return ENTRY_OTHER;
    bool link = S_ISLNK(about.st_mode);
    if (link && (stat(path, &about) != 0 || !leads_inside(root, path))) return ENTRY_LINK;
    if (S_ISDIR(about.st_mode)) return link ? ENTRY_LINK : ENTRY_FOLDER;
    return S_ISREG(about.st_mode) ? ENTRY_FILE : ENTRY_OTHER;
}

/* Calls `visit` for each entry of the folder `path`. Returns false if the folder cannot be read or
 * `visit` returned false. `root` is the package's folder. */
static bool list_folder(const char *root, const char *path, entry_visitor visit, void *user) {
    DIR *folder = opendir(path);
    bool sound = folder != NULL;
    const struct dirent *entry;
    while (sound && (entry = readdir(folder)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        size_t size = strlen(path) + strlen(entry->d_name) + 2;
        char *full = malloc(size);
        if (full) snprintf(full, size, "%s/%s", path, entry->d_name);
        sound = full && visit(user, entry->d_name, entry_of(root, full));
        free(full);
    }
    if (folder) closedir(folder);
    return sound;
}

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

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Creates a file that its owner alone can read. */
static FILE *create_file(const char *path) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    FILE *opened = file >= 0 ? fdopen(file, "wb") : NULL;
    if (file >= 0 && !opened) close(file);
    return opened;
}

/* Gives the file `from` the name `to`, in place of the file that has it. */
static bool replace_file(const char *from, const char *to) { return rename(from, to) == 0; }
static void remove_file(const char *path) { unlink(path); }

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
