// Package plan says what the test site consists of: the clusters, their
// machines, every address and range, and the names of files and namespaces.
// It is pure data and string work; nothing here touches the system.
package plan

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
)

// Images every node holds. The names look like upstream's, the contents are built here.
const (
	PauseImage   = "registry.k8s.io/pause:3.10"
	CoreDNSImage = "registry.k8s.io/coredns/coredns:v1.13.1"
	TestappImage = "testapp.local/testapp:1"
	BusyboxImage = "testapp.local/busybox:1"
)

// Names of the machines that all clusters share.
const (
	Wan    = "wan"    // router, firewall and the outside world's DNS and web server
	Laptop = "laptop" // the developer's machine
	LAN    = "lan"    // a neighbour on the laptop's own network
)

// Addrs is an address of each family.
type Addrs struct{ V4, V6 netip.Addr }

// List returns the addresses, IPv4 first.
func (a Addrs) List() []netip.Addr { return []netip.Addr{a.V4, a.V6} }

// Strings returns the addresses as text, IPv4 first.
func (a Addrs) Strings() []string { return []string{a.V4.String(), a.V6.String()} }

// Ranges is a prefix of each family.
type Ranges struct{ V4, V6 netip.Prefix }

// List returns the prefixes, IPv4 first.
func (r Ranges) List() []netip.Prefix { return []netip.Prefix{r.V4, r.V6} }

// String joins the two prefixes with a comma, as Kubernetes' flags want them.
func (r Ranges) String() string { return r.V4.String() + "," + r.V6.String() }

// On gives an address of the range's networks with the ranges' prefix lengths.
func (r Ranges) On(a Addrs) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(a.V4, r.V4.Bits()),
		netip.PrefixFrom(a.V6, r.V6.Bits()),
	}
}

func addrs(v4, v6 string) Addrs {
	return Addrs{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

func ranges(v4, v6 string) Ranges {
	return Ranges{netip.MustParsePrefix(v4), netip.MustParsePrefix(v6)}
}

// Machine is one box of a cluster.
type Machine struct {
	Name  string
	Addrs Addrs
	// Pods are the pod ranges of a node; the zero value marks the control plane.
	Pods Ranges
	// Hairpin says whether a pod can reach itself through its own Service.
	Hairpin bool
}

// IsNode says whether pods run on the machine.
func (m Machine) IsNode() bool { return m.Pods.V4.IsValid() }

// Cluster is one Kubernetes cluster.
type Cluster struct {
	Name        string // "a", "b"
	Domain      string // the cluster's DNS domain
	Context     string // name of the context in the kubeconfigs
	LAN         Ranges // the network of its machines
	Gateway     Addrs  // wan's addresses on that network
	Pods        Ranges
	Services    Ranges
	DNS         Addrs // the cluster DNS Service
	FirstSvc    Addrs // the Service "kubernetes"
	CP          Machine
	Nodes       []Machine
	EchoReplica int  // replicas of demo's Deployment "echo"
	Small       bool // only the small demo: no StatefulSet, no namespace dev
}

// Machines returns the control plane and then the nodes.
func (c *Cluster) Machines() []Machine { return append([]Machine{c.CP}, c.Nodes...) }

// Server is the API server's URL.
func (c *Cluster) Server() string { return fmt.Sprintf("https://%s:6443", c.CP.Addrs.V4) }

// Bridge is the name of the cluster's network in wan.
func (c *Cluster) Bridge() string { return "lan-" + c.Name }

// Addresses of the laptop's side.
var (
	Home       = ranges("192.168.50.0/24", "fd00:192:168:50::/64")
	HomeRouter = addrs("192.168.50.1", "fd00:192:168:50::1")
	LaptopAddr = addrs("192.168.50.2", "fd00:192:168:50::2")
	LANAddr    = addrs("192.168.50.9", "fd00:192:168:50::9")
	// Internet is a host out there: www.example.test and friends. It lives in wan.
	Internet = addrs("198.51.100.80", "2001:db8:80::80")
)

// Outside are the names that the outside world's DNS knows; all others do not exist.
func Outside() map[string]Addrs {
	names := map[string]Addrs{
		"www.example.test":  Internet,
		"go.dev":            Internet,
		"www.dev-corp.test": Internet,
		"router.home.test":  HomeRouter,
	}
	for _, c := range All() {
		names[APIName(c)] = c.CP.Addrs
	}
	return names
}

// APIName is the API server's name in the outside world's DNS.
func APIName(c *Cluster) string {
	if c.Name == "a" {
		return "api.cluster.test"
	}
	return "api-" + c.Name + ".cluster.test"
}

// All returns every cluster that can be brought up.
func All() []*Cluster {
	a := &Cluster{
		Name: "a", Domain: "cluster.local", Context: "culvert-test", EchoReplica: 2,
		LAN:      ranges("172.30.0.0/24", "fd00:172:30::/64"),
		Gateway:  addrs("172.30.0.1", "fd00:172:30::1"),
		Pods:     ranges("10.244.0.0/16", "fd00:10:244::/48"),
		Services: ranges("10.96.0.0/16", "fd00:10:96::/112"),
		DNS:      addrs("10.96.0.10", "fd00:10:96::a"),
		FirstSvc: addrs("10.96.0.1", "fd00:10:96::1"),
		CP:       Machine{Name: "cp", Addrs: addrs("172.30.0.10", "fd00:172:30::10")},
		Nodes: []Machine{
			{Name: "node1", Addrs: addrs("172.30.0.11", "fd00:172:30::11"), Pods: ranges("10.244.1.0/24", "fd00:10:244:1::/64"), Hairpin: true},
			{Name: "node2", Addrs: addrs("172.30.0.12", "fd00:172:30::12"), Pods: ranges("10.244.2.0/24", "fd00:10:244:2::/64")},
		},
	}
	b := &Cluster{
		Name: "b", Domain: "corp.internal", Context: "culvert-test-b", EchoReplica: 1, Small: true,
		LAN:      ranges("172.31.0.0/24", "fd00:172:31::/64"),
		Gateway:  addrs("172.31.0.1", "fd00:172:31::1"),
		Pods:     ranges("10.245.0.0/16", "fd00:10:245::/48"),
		Services: ranges("10.97.0.0/16", "fd00:10:97::/112"),
		DNS:      addrs("10.97.0.10", "fd00:10:97::a"),
		FirstSvc: addrs("10.97.0.1", "fd00:10:97::1"),
		CP:       Machine{Name: "cp", Addrs: addrs("172.31.0.10", "fd00:172:31::10")},
		Nodes: []Machine{
			{Name: "node1", Addrs: addrs("172.31.0.11", "fd00:172:31::11"), Pods: ranges("10.245.1.0/24", "fd00:10:245:1::/64"), Hairpin: true},
		},
	}
	return []*Cluster{a, b}
}

// Find returns the cluster of that name.
func Find(name string) (*Cluster, error) {
	all := All()
	i := slices.IndexFunc(all, func(c *Cluster) bool { return c.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("no cluster is called %q: there are a and b", name)
	}
	return all[i], nil
}

// Site is where everything lies on this machine.
type Site struct {
	Prefix    string // of namespaces and control groups: PREFIX-laptop, PREFIX-node1, PREFIX-b-node1
	State     string // directory of all state
	Bin       string // directory of the components' binaries
	Images    string // directory of the image tars
	RBAC      string // directory of the project's RBAC manifests; may be missing
	Self      string // the testcluster executable
	ProxyMode string // kube-proxy's mode
}

// Shared says whether a machine belongs to no cluster.
func Shared(machine string) bool {
	return machine == Wan || machine == Laptop || machine == LAN
}

// Namespace is the name of a machine's network namespace and control groups.
func (s *Site) Namespace(cluster, machine string) string {
	if Shared(machine) || cluster == "a" {
		return s.Prefix + "-" + machine
	}
	return s.Prefix + "-" + cluster + "-" + machine
}

// Netns is the file that holds a machine's network namespace.
func (s *Site) Netns(cluster, machine string) string {
	return filepath.Join("/run/netns", s.Namespace(cluster, machine))
}

// ClusterDir is a cluster's state directory.
func (s *Site) ClusterDir(cluster string) string { return filepath.Join(s.State, cluster) }

// SharedDir is the state directory of what the clusters share.
func (s *Site) SharedDir() string { return filepath.Join(s.State, "shared") }

// MachineDir is a machine's state directory.
func (s *Site) MachineDir(cluster, machine string) string {
	if Shared(machine) {
		return filepath.Join(s.SharedDir(), machine)
	}
	return filepath.Join(s.ClusterDir(cluster), machine)
}

// PKIDir holds a cluster's keys and the components' kubeconfigs.
func (s *Site) PKIDir(cluster string) string { return filepath.Join(s.ClusterDir(cluster), "pki") }

// Kubeconfig is the path of a user's kubeconfig.
func (s *Site) Kubeconfig(cluster, user string) string {
	return filepath.Join(s.ClusterDir(cluster), "users", user+".kubeconfig")
}
