#ifndef STUB_STDDEF_H
#define STUB_STDDEF_H
#include <linux/types.h>
#endif
