import sys,os,ctypes
sys.path.append('/usr/lib/python3/dist-packages')
from otel_nginx_ebpf import plan
from otel_nginx_ebpf.nginx.binary import Binary
from otel_nginx_ebpf.nginx.layouts import layout_for
from otel_nginx_ebpf.kernel.program import program_text
from pathlib import Path
import bcc,time
from bcc.libbcc import lib
b=Binary(Path('/usr/sbin/nginx')); l=layout_for(b)
from otel_nginx_ebpf import sampling,config; opts=dict(sampling.constants(config.load({})))
for a in sys.argv[1:]:
    k,v=a.split('='); opts[k]=int(v)
t=program_text(l.structs,{'SITE_ngx_http_free_request':1,"ADDRESS_ngx_http_core_module":2,"ADDRESS_ngx_cached_time":3,"ADDRESS_ngx_current_msec":4,"DETAIL_REQUEST":0,**opts},follow_all=True,follow_forks=True,pid_namespace=None,active_requests_max=1024,ring_buffer_bytes=1<<20)
os.environ['BCC_KERNEL_SOURCE']='probes/stub_headers'
t0=time.time()
p=bcc.BPF(text=t)
print('compile',round(time.time()-t0,2))
import subprocess
for h in ['ngx_http_create_request','ngx_http_free_request','ngx_http_upstream_free_round_robin_peer','ngx_http_request_body_save_filter','ngx_http_send_header']+(['ngx_http_v2_send_output_queue'] if 'last_out' in l.structs.get('ngx_http_v2_connection_s',{}) else [])+(['ngx_http_process_request'] if opts.get('PROPAGATE') else []):
    t0=time.time()
    f=p.load_func(f'enter_{h}'.encode(),bcc.BPF.KPROBE)
    info=open(f'/proc/self/fdinfo/{f.fd}').read()
    print(h,round(time.time()-t0,2),[x for x in info.split('\n') if 'verified' in x or 'jited' in x or 'xlated' in x])
f=p.load_func(b'raw_tracepoint__sys_exit',bcc.BPF.RAW_TRACEPOINT)
print('sys_exit',open(f'/proc/self/fdinfo/{f.fd}').read().split('\n')[-4:])
