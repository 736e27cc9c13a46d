/* All that is x86-64: system call numbers and where a system call's arguments lie (BCC has PT_REGS_PARM1… for functions). */

#define SYS_read 0
#define SYS_write 1
#define SYS_close 3
#define SYS_readv 19
#define SYS_writev 20
#define SYS_sendfile 40
#define SYS_socket 41
#define SYS_connect 42
#define SYS_accept 43
#define SYS_sendto 44
#define SYS_recvfrom 45
#define SYS_sendmsg 46
#define SYS_recvmsg 47
#define SYS_getsockopt 55
#define SYS_clone 56
#define SYS_fork 57
#define SYS_accept4 288

/* rdi and orig_rax are neighbours in pt_regs: one read fetches both. */
struct syscall_entry {
    unsigned long argument1;
    unsigned long number;
};
#define SYSCALL_ENTRY(regs) (&(regs)->di)

/* The remaining arguments, in order: rsi, rdx, r10. */
#define SYSCALL_ARGUMENT2(regs) (&(regs)->si)
#define SYSCALL_ARGUMENT3(regs) (&(regs)->dx)
#define SYSCALL_ARGUMENT4(regs) (&(regs)->r10)
