/* Names in nginx's configuration. */

#define KNOWN_NAMES_FACTOR 0x9e3779b97f4a7c15ULL

/* Returns where the name in the http core module's configuration is. `confs` is r->srv_conf or r->loc_conf, `kind` the kind of
 * string. A worker's configuration does not change, so the name's place is looked up once; only with `master_process off` a reload
 * changes it. NULL: the name could not be read. */
static __always_inline struct known_name *core_conf_name(struct process *process, u8 kind, u64 confs, u64 name_offset)
{
    u64 key = confs + kind, conf = 0; /* the address is a multiple of 8, and the two kinds differ in these bits */
    struct known_name *known = &process->known_names[(key * KNOWN_NAMES_FACTOR) >> 58];
    if (known->key != key || !process->keeps_configuration) {
        known->key = 0;
        if (bpf_probe_read_user(&conf, sizeof(conf), (void *)(confs + process->core_module_index * 8)) != 0 || !conf
            || bpf_probe_read_user(&known->name, sizeof(known->name), (void *)(conf + name_offset)) != 0)
            return NULL;
        known->key = key;
    }
    return known;
}
