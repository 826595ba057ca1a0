/* A stand-in for NVIDIA's driver, called by Triton's C code. It loads and launches nothing, and notes its arguments.
 *
 * Pointers are taken as they are, so tensors on the CPU will do.
 */

#include <cuda.h>
#include <string.h>

#define MOST 64
/* Of the kernel `update` with two averages: rows, chunks, step, two weights. */
#define UPDATE_ARGUMENTS 5

struct launch {
  char name[64];
  unsigned int blocks, threads;
  unsigned long long arguments[UPDATE_ARGUMENTS];
};

struct launch launches[MOST];
int num_launches;
static int num_modules;
static char names[MOST][64];

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)(size_t)++num_modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  size_t number = (size_t)module;
  if (number >= MOST) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(names[number], name, sizeof names[number] - 1);
  *function = (CUfunction)number;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  if (num_launches == MOST) return CUDA_ERROR_OUT_OF_MEMORY;
  struct launch *launch = &launches[num_launches++];
  strcpy(launch->name, names[(size_t)function]);
  launch->blocks = config->gridDimX;
  launch->threads = config->blockDimX;
  /* Eight bytes of each: weights have four, the rest is not looked at. */
  for (int i = 0; i < UPDATE_ARGUMENTS && !strcmp(launch->name, "update"); i++)
    memcpy(&launch->arguments[i], arguments[i], 8);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

/* The limits of an H100, or less. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 49152;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
