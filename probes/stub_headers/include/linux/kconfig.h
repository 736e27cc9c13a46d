/* BCC includes this before anything else. */
#ifndef STUB_LINUX_KCONFIG_H
#define STUB_LINUX_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
