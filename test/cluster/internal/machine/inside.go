package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// sysctls are the values that the kubelet wants. It is shown them in files
// mounted over the real ones, so that it has no reason to write settings
// which belong to the whole host.
var sysctls = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// Inside is the second step: see the package's comment. It returns only on an error.
func Inside(s *Spec) error {
	tell := os.NewFile(3, "ready")
	unix.CloseOnExec(3)
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := buildRoot(s); err != nil {
		return err
	}
	if _, err := tell.WriteString("ok"); err != nil {
		return fmt.Errorf("report that the machine runs: %w", err)
	}
	tell.Close()
	return supervise(s)
}

// mounter remembers the first error of a row of file system operations.
type mounter struct{ err error }

func (m *mounter) do(what string, err error) {
	if m.err == nil && err != nil {
		m.err = fmt.Errorf("%s: %w", what, err)
	}
}

func (m *mounter) mkdir(path string) {
	if m.err == nil {
		m.do("make directory", os.MkdirAll(path, 0o755))
	}
}

func (m *mounter) mount(source, target, kind string, flags uintptr, data string) {
	if m.err == nil {
		m.do(fmt.Sprintf("mount %s %s on %s", kind, source, target), unix.Mount(source, target, kind, flags, data))
	}
}

func (m *mounter) bind(source, target string) {
	m.mkdir(target)
	m.mount(source, target, "", unix.MS_BIND, "")
}

func (m *mounter) write(path, text string) {
	m.mkdir(filepath.Dir(path))
	if m.err == nil {
		os.Remove(path) // it may be a link that leads out
		m.do("write", os.WriteFile(path, []byte(text), 0o644))
	}
}

// buildRoot makes the machine's root, an overlay over the host's whose writes
// go to a tmpfs, and changes into it.
func buildRoot(s *Spec) error {
	m := &mounter{}
	m.mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	rw, root := filepath.Join(s.Dir, "rw"), filepath.Join(s.Dir, "root")
	in := func(p string) string { return filepath.Join(root, p) }
	m.mkdir(rw)
	m.mkdir(root)
	// The upper layer must not lie on the lower layer's own tree.
	m.mount("tmpfs", rw, "tmpfs", 0, "size=1g,mode=755")
	m.mkdir(rw + "/up")
	m.mkdir(rw + "/work")
	m.mount("overlay", root, "overlay", 0, "lowerdir=/,upperdir="+rw+"/up,workdir="+rw+"/work")
	m.mount("proc", in("proc"), "proc", 0, "")
	m.mount("sysfs", in("sys"), "sysfs", 0, "")
	m.mount("/dev", in("dev"), "", unix.MS_BIND|unix.MS_REC, "")
	m.mount("tmpfs", in("run"), "tmpfs", 0, "mode=755")
	m.mkdir(in("run/lock"))
	m.mount("tmpfs", in("tmp"), "tmpfs", 0, "mode=1777")
	for _, dir := range s.Share {
		m.bind(dir, in(dir))
	}
	mountCgroups(m, in("sys/fs/cgroup"))
	if s.Node {
		for _, d := range []string{"var/lib/containerd", "var/lib/kubelet", "var/log/pods"} {
			source := filepath.Join(s.Dir, strings.ReplaceAll(d, "/", "-"))
			m.mkdir(source)
			m.bind(source, in(d))
		}
		for _, d := range []string{"var/log/containers", "var/lib/cni", "etc/cni/net.d"} { // the host's may hold another kubelet's things
			m.mkdir(in(d))
			m.mount("tmpfs", in(d), "tmpfs", 0, "mode=755")
		}
		for name, value := range sysctls {
			f := in("run/sysctl/" + strings.ReplaceAll(name, "/", "_"))
			m.write(f, value+"\n")
			m.mount(f, in("proc/sys/"+name), "", unix.MS_BIND, "")
		}
	}
	for name, text := range s.Files {
		m.write(in(name), text)
	}
	old := in(".old")
	m.mkdir(old)
	if m.err != nil {
		return m.err
	}
	m.do("enter the root", os.Chdir(root))
	m.do("pivot the root", unix.PivotRoot(".", ".old"))
	m.do("enter the new root", os.Chdir("/"))
	m.do("let go of the old root", unix.Unmount("/.old", unix.MNT_DETACH))
	m.do("remove the old root's mount point", os.Remove("/.old"))
	m.mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") // the kubelet needs it for volumes
	return m.err
}

// mountCgroups shows the machine its own groups as the roots of the hierarchies.
func mountCgroups(m *mounter, dir string) {
	hs, err := hierarchies()
	m.do("find the cgroup hierarchies", err)
	m.mount("tmpfs", dir, "tmpfs", 0, "mode=755")
	for _, h := range hs {
		d := filepath.Join(dir, h.dir)
		m.mkdir(d)
		m.mount("cgroup", d, "cgroup", 0, h.options)
	}
}
