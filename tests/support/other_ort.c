/* A fake ONNX Runtime, version 1.2.3, without any function. */
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

typedef struct OrtApiBase {
    const void *(*GetApi)(uint32_t);
    const char *(*GetVersionString)(void);
} OrtApiBase;

static const void *get_api(uint32_t version) {
    (void)version;
    return NULL;
}

static const char *get_version(void) { return "1.2.3"; }

EXPORT const OrtApiBase *OrtGetApiBase(void) {
    static const OrtApiBase base = {get_api, get_version};
    return &base;
}
