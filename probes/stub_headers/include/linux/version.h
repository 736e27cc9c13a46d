/* The oldest kernel with a ring buffer. Since 5.0 the kernel ignores a program's version (6c4fc209fcf9). */
#ifndef STUB_LINUX_VERSION_H
#define STUB_LINUX_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
#endif
