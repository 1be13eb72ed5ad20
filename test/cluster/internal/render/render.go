// Package render writes the components' command lines and configuration files
// from the plan. It is pure: what it returns is text.
package render

import (
	"bytes"
	"embed"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

//go:embed files
var files embed.FS

var templates = template.Must(template.New("").Option("missingkey=error").ParseFS(files, "files/*"))

// view is what the templates see.
type view struct {
	Cluster *plan.Cluster
	Machine plan.Machine
	Site    *plan.Site
	PKI     string // directory of the keys
	Images  map[string]string
	Names   []name
}

type name struct {
	Name  string
	Addrs plan.Addrs
}

func execute(file string, v view) (string, error) {
	v.Images = map[string]string{
		"pause": plan.PauseImage, "coredns": plan.CoreDNSImage, "testapp": plan.TestappImage, "busybox": plan.BusyboxImage,
	}
	var b bytes.Buffer
	if err := templates.ExecuteTemplate(&b, file, v); err != nil {
		return "", fmt.Errorf("render %s: %w", file, err)
	}
	return b.String(), nil
}

// Manifest renders one of the manifests: base.yaml, demo.yaml, rbac.yaml.
func Manifest(s *plan.Site, c *plan.Cluster, file string) (string, error) {
	return execute(file, view{Cluster: c, Site: s})
}

// Resolv is the resolv.conf of a machine whose router is at gateway.
func Resolv(gateway plan.Addrs) string { return "nameserver " + gateway.V4.String() + "\n" }

// Wan describes the machine wan: it runs the outside world's DNS and web
// server and the cable to the laptop.
func Wan(s *plan.Site) (*machine.Spec, error) {
	v := view{Site: s}
	for n, a := range plan.Outside() {
		v.Names = append(v.Names, name{n, a})
	}
	slices.SortFunc(v.Names, func(a, b name) int { return strings.Compare(a.Name, b.Name) })
	corefile, err := execute("wan.Corefile", v)
	if err != nil {
		return nil, err
	}
	m := spec(s, "", plan.Wan)
	m.Share = []string{s.Bin, filepath.Dir(s.Self), s.SharedDir()}
	m.Files = map[string]string{
		"etc/hosts": "127.0.0.1 localhost\n", "etc/resolv.conf": Resolv(plan.HomeRouter),
		"etc/coredns/Corefile": corefile,
	}
	web := netip.AddrPortFrom(plan.Internet.V4, 80)
	web6 := netip.AddrPortFrom(plan.Internet.V6, 80)
	m.Processes = []machine.Process{
		{Name: "coredns", Args: []string{"coredns", "-conf", "/etc/coredns/Corefile"}},
		{Name: "web", Args: []string{"testapp", "serve", "--http", web.String() + "," + web6.String()}},
		{Name: "cable", Args: []string{s.Self, "machine", "cable", m.Dir}},
	}
	return m, nil
}

// ControlPlane describes the machine cp.
func ControlPlane(s *plan.Site, c *plan.Cluster) *machine.Spec {
	m := clusterSpec(s, c, c.CP)
	pki := func(name string) string { return filepath.Join(s.PKIDir(c.Name), name) }
	requestHeader := "--requestheader-client-ca-file=" + pki("front-proxy-ca.crt")
	m.Processes = []machine.Process{
		{Name: "etcd", Args: []string{"etcd", "--name=cp", "--data-dir=" + filepath.Join(m.Dir, "etcd"), "--unsafe-no-fsync",
			"--listen-client-urls=https://127.0.0.1:2379", "--advertise-client-urls=https://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=cp=http://127.0.0.1:2380", "--trusted-ca-file=" + pki("etcd-ca.crt"),
			"--cert-file=" + pki("etcd.crt"), "--key-file=" + pki("etcd.key"), "--client-cert-auth", "--log-level=warn"}},
		{Name: "kube-apiserver", Args: []string{"kube-apiserver",
			"--advertise-address=" + c.CP.Addrs.V4.String(), "--bind-address=::", "--secure-port=6443",
			"--etcd-servers=https://127.0.0.1:2379", "--etcd-cafile=" + pki("etcd-ca.crt"),
			"--etcd-certfile=" + pki("apiserver-etcd-client.crt"), "--etcd-keyfile=" + pki("apiserver-etcd-client.key"),
			"--client-ca-file=" + pki("ca.crt"), "--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
			"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"), "--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
			"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc." + c.Domain,
			"--service-account-key-file=" + pki("sa.pub"), "--service-account-signing-key-file=" + pki("sa.key"),
			"--service-cluster-ip-range=" + c.Services.String(), "--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			// Without a front-proxy CA, controller-manager and scheduler log an error every 10 s.
			requestHeader, "--requestheader-allowed-names=front-proxy-client", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User",
			"--proxy-client-cert-file=" + pki("front-proxy-client.crt"), "--proxy-client-key-file=" + pki("front-proxy-client.key"),
			"--enable-aggregator-routing=true"}},
		{Name: "kube-controller-manager", Args: append(component(pki, "kube-controller-manager", "controller-manager"),
			"--allocate-node-cidrs=false", "--service-cluster-ip-range="+c.Services.String(),
			"--service-account-private-key-file="+pki("sa.key"), "--root-ca-file="+pki("ca.crt"),
			"--cluster-signing-cert-file="+pki("ca.crt"), "--cluster-signing-key-file="+pki("ca.key"),
			"--client-ca-file="+pki("ca.crt"), requestHeader, "--use-service-account-credentials=true",
			"--kube-api-qps=500", "--kube-api-burst=1000")}, // at the default rate its controllers take 4 s to start
		{Name: "kube-scheduler", Args: component(pki, "kube-scheduler", "scheduler")},
	}
	return m
}

func component(pki func(string) string, program, user string) []string {
	config := pki(user + ".kubeconfig")
	return []string{program, "--kubeconfig=" + config, "--authentication-kubeconfig=" + config,
		"--authorization-kubeconfig=" + config, "--leader-elect=false"}
}

// Node describes a machine that runs pods.
func Node(s *plan.Site, c *plan.Cluster, n plan.Machine) (*machine.Spec, error) {
	m := clusterSpec(s, c, n)
	m.Node = true
	v := view{Cluster: c, Machine: n, Site: s, PKI: s.PKIDir(c.Name)}
	for _, f := range []struct{ template, path string }{
		{"cni.conflist", "etc/cni/net.d/10-bridge.conflist"},
		{"containerd.toml", "etc/containerd/config.toml"},
		{"kubelet.yaml", "etc/kubernetes/kubelet.yaml"},
		{"kube-proxy.yaml", "etc/kubernetes/kube-proxy.yaml"},
		{"crictl.yaml", "etc/crictl.yaml"},
	} {
		text, err := execute(f.template, v)
		if err != nil {
			return nil, err
		}
		m.Files[f.path] = text
	}
	m.Processes = []machine.Process{
		{Name: "containerd", Args: []string{"containerd", "--config", "/etc/containerd/config.toml"}},
		{Name: "kubelet", WaitFor: "/run/containerd/containerd.sock", Args: []string{"kubelet",
			"--config=/etc/kubernetes/kubelet.yaml",
			"--kubeconfig=" + filepath.Join(v.PKI, "kubelet-"+n.Name+".kubeconfig"),
			"--hostname-override=" + n.Name, "--node-ip=" + strings.Join(n.Addrs.Strings(), ","),
			"--root-dir=/var/lib/kubelet"}},
		{Name: "kube-proxy", Args: []string{"kube-proxy", "--config=/etc/kubernetes/kube-proxy.yaml"}},
	}
	return m, nil
}

func clusterSpec(s *plan.Site, c *plan.Cluster, m plan.Machine) *machine.Spec {
	x := spec(s, c.Name, m.Name)
	x.Share = []string{s.Bin, s.ClusterDir(c.Name)}
	x.Files = map[string]string{
		"etc/hosts":       fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s cp\n%s cp\n", c.CP.Addrs.V4, c.CP.Addrs.V6),
		"etc/resolv.conf": Resolv(c.Gateway),
	}
	return x
}

func spec(s *plan.Site, cluster, name string) *machine.Spec {
	return &machine.Spec{
		Name: name, Group: s.Namespace(cluster, name), Netns: s.Netns(cluster, name),
		Dir: s.MachineDir(cluster, name), Bin: s.Bin,
	}
}
