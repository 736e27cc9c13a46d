/* Everything specific to x86-64: the system call numbers, and the registers of a system call's arguments (for functions BCC has
 * PT_REGS_PARM1…). */

#define SYS_read 0
#define SYS_write 1
#define SYS_close 3
#define SYS_fstat 5
#define SYS_ioctl 16
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
#define SYS_shutdown 48
#define SYS_getsockname 51
#define SYS_setsockopt 54
#define SYS_getsockopt 55
#define SYS_clone 56
#define SYS_fork 57
#define SYS_epoll_wait 232
#define SYS_epoll_ctl 233
#define SYS_newfstatat 262
#define SYS_epoll_pwait 281
#define SYS_accept4 288

/* The end of pt_regs, from r10 on. One read gets the number and the arguments of a system call. */
struct syscall_entry {
    unsigned long argument4;  /* r10 */
    unsigned long argument6;
    unsigned long argument5;
    unsigned long result;
    unsigned long cx;
    unsigned long argument3;
    unsigned long argument2;
    unsigned long argument1;
    unsigned long number;     /* orig_rax */
};
#define SYSCALL_ENTRY(regs) (&(regs)->r10)
