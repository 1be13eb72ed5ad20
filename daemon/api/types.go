// Package api is the daemon's HTTP+JSON API on a Unix socket: its types, shared
// with the session and the CLI, and its Go client. It is the only interface
// that programs other than culvertd use.
package api

import (
	"net/netip"
	"time"
)

// State is where a session is in its life. The strings are part of the API.
type State string

// The states of a session, in the order in which a healthy one passes them.
const (
	Disconnected  State = "disconnected"
	Connecting    State = "connecting"   // Session.Step says which step
	Connected     State = "connected"    // a packet went to the cluster and came back
	Reconnecting  State = "reconnecting" // Session.Cause says why; TUN and routes stay
	NeedsLogin    State = "needs login"  // credentials need the user; TUN and routes stay
	Disconnecting State = "disconnecting"
)

// Options say what to connect to and how. The CLI makes them from its flags;
// the daemon hands them to the session process unread (it opens no path in
// them), and the session uses them with the calling user's rights.
type Options struct {
	// Kubeconfig is a path or a list of paths in KUBECONFIG's syntax, made
	// absolute by the CLI; empty means KUBECONFIG or ~/.kube/config.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	Context    string `json:"context,omitempty"`   // empty: the kubeconfig's current context
	Namespace  string `json:"namespace,omitempty"` // empty: the context's own, then "default"

	// IncludeIPs and ExcludeIPs are IPs, CIDRs or host names, both families.
	IncludeIPs []string `json:"includeIPs,omitempty"`
	ExcludeIPs []string `json:"excludeIPs,omitempty"`

	Image            string            `json:"image,omitempty"`
	ImagePullSecrets []string          `json:"imagePullSecrets,omitempty"`
	ImagePullPolicy  string            `json:"imagePullPolicy,omitempty"` // Always, IfNotPresent (default) or Never
	NodeSelector     map[string]string `json:"nodeSelector,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	Annotations      map[string]string `json:"annotations,omitempty"`
	ServiceAccount   string            `json:"serviceAccount,omitempty"` // the pod's; its token is never mounted
	PodQuota         string            `json:"podQuota,omitempty"`       // "0.5c,512m": CPU and memory, requests and limits

	Carrier string `json:"carrier,omitempty"` // auto (default), port-forward, pods-proxy or udp
	// UDP says whether packets may go straight to the agent where that works: auto
	// (default, at the pod's address), nodeport (also at a Service of that type,
	// which is made for it) or off.
	UDP           string        `json:"udp,omitempty"`
	ClusterDomain string        `json:"clusterDomain,omitempty"` // empty: what the agent's resolv.conf says
	DNS           string        `json:"dns,omitempty"`           // auto (default), resolved, resolvconf or none
	Timeout       time.Duration `json:"timeout,omitempty"`       // until connected; 0: 60 s
	Debug         bool          `json:"debug,omitempty"`

	// InterceptOnly: the machine stays as it is, without routes and names; only
	// intercepts lead traffic here. It may be beside a whole session to the cluster.
	InterceptOnly bool `json:"interceptOnly,omitempty"`
}

// ConnectRequest asks for a session as the calling user, who is known by the
// socket's peer credentials.
type ConnectRequest struct {
	Options Options `json:"options"`
	// Env is the caller's environment, for kubeconfig exec plugins and proxies.
	// It goes to the session process and is kept in memory only.
	Env []string `json:"env,omitempty"`
	// AtBoot: connect again when the daemon starts, as this user, with Options
	// and without Env.
	AtBoot bool `json:"atBoot,omitempty"`
	// AsUID connects as that user; only root may set it (`sudo culvert connect`
	// names SUDO_UID). 0: as the caller, which root may not be.
	AsUID int `json:"asUID,omitempty"`
}

// DisconnectRequest ends the caller's sessions. With neither ID nor Context
// set, it ends all of them.
type DisconnectRequest struct {
	ID      string `json:"id,omitempty"`
	Context string `json:"context,omitempty"`
}

// Session is what status shows of one session.
type Session struct {
	ID        string    `json:"id"`
	UID       int       `json:"uid"`
	User      string    `json:"user,omitempty"`
	Context   string    `json:"context,omitempty"`
	Server    string    `json:"server,omitempty"`  // the API server's URL
	Cluster   string    `json:"cluster,omitempty"` // hash of CA and API address: tells clusters apart
	Namespace string    `json:"namespace,omitempty"`
	State     State     `json:"state"`
	Step      string    `json:"step,omitempty"`  // while connecting
	Cause     string    `json:"cause,omitempty"` // while reconnecting or needs login
	Error     *Error    `json:"error,omitempty"` // why it ended, when Disconnected
	Since     time.Time `json:"since"`           // of State
	Started   time.Time `json:"started"`         // of the session
	Restarts  int       `json:"restarts"`        // of the session process
	PID       int       `json:"pid,omitempty"`   // of the session process
	AtBoot    bool      `json:"atBoot,omitempty"`
	// InterceptOnly is that of Options.
	InterceptOnly bool `json:"interceptOnly,omitempty"`
	// Reverting: it connects to nothing and undoes what an earlier session of this
	// id left in the cluster when it died.
	Reverting bool `json:"reverting,omitempty"`

	Device    string         `json:"device,omitempty"`
	Addresses []netip.Prefix `json:"addresses,omitempty"` // on Device, /32 and /128
	Routes    []Route        `json:"routes,omitempty"`
	Excluded  []Route        `json:"excluded,omitempty"`
	DNS       DNSStatus      `json:"dns"`
	Agent     AgentStatus    `json:"agent"`
	Carrier   CarrierStatus  `json:"carrier"`
	Notes     []string       `json:"notes,omitempty"` // e.g. what RBAC kept from view, and what follows
}

// Route is one captured or excluded prefix and where it came from.
type Route struct {
	Prefix netip.Prefix `json:"prefix"`
	Source string       `json:"source"` // "ServiceCIDR kubernetes", "node node1", "--exclude-ips", "API server", ...
}

// DNSStatus says how names of the cluster resolve on this machine.
type DNSStatus struct {
	Mode          string   `json:"mode,omitempty"` // resolved, resolvconf or none
	Server        string   `json:"server,omitempty"`
	ClusterDomain string   `json:"clusterDomain,omitempty"`
	Domains       []string `json:"domains,omitempty"`
}

// AgentStatus is the session's pod in the cluster.
type AgentStatus struct {
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Node      string `json:"node,omitempty"`
	Image     string `json:"image,omitempty"`
	Version   string `json:"version,omitempty"`
}

// CarrierStatus is the path that encrypted packets take.
type CarrierStatus struct {
	Name string `json:"name,omitempty"` // UDP, pods/proxy, port-forward (WebSocket), port-forward (SPDY)
	// Lanes is how many connections carry packets: 2 when bulk has its own.
	Lanes    int           `json:"lanes,omitempty"`
	RTT      time.Duration `json:"rtt,omitempty"` // last in-band ping, nanoseconds
	Redials  int           `json:"redials"`
	Sent     uint64        `json:"sent"`     // bytes of encrypted packets
	Received uint64        `json:"received"` // bytes of encrypted packets
	// SentRate and ReceivedRate are bytes per second, over the last few seconds.
	SentRate     uint64 `json:"sentRate,omitempty"`
	ReceivedRate uint64 `json:"receivedRate,omitempty"`
	// Others are the carriers that are not in use.
	Others []OtherCarrier `json:"others,omitempty"`
}

// OtherCarrier is a carrier that could be used, and why it is not.
type OtherCarrier struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// What Options.Carrier may be, beside "".
const (
	CarrierAuto        = "auto"
	CarrierPortForward = "port-forward"
	CarrierPodsProxy   = "pods-proxy"
	CarrierUDP         = "udp"
)

// What Options.UDP may be, beside "".
const (
	UDPAuto     = "auto"
	UDPNodePort = "nodeport"
	UDPOff      = "off"
)

// Event is one line of the connect and watch streams.
type Event struct {
	Session Session `json:"session"`
}

// Line is one line of a streamed answer (newline-delimited JSON): exactly one
// field is set. The last line has Error or End; a stream without one was cut.
type Line struct {
	Event     *Event     `json:"event,omitempty"`
	Ping      *PingReply `json:"ping,omitempty"`
	Step      string     `json:"step,omitempty"`
	Intercept *Intercept `json:"intercept,omitempty"`
	Error     *Error     `json:"error,omitempty"`
	End       bool       `json:"end,omitempty"`
}

// Version is what the daemon says of itself.
type Version struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
}

// FactsRequest names the prefixes that a doctor wants checked for conflicts.
type FactsRequest struct {
	Plan []Route `json:"plan,omitempty"`
}

// Error is an error for the user: what failed, why, and what helps.
type Error struct {
	Code    string `json:"code"`           // machine readable, e.g. "forbidden"; see the Code constants
	Message string `json:"message"`        // names the input and the reason
	Hint    string `json:"hint,omitempty"` // the command or flag that helps
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + "\n" + e.Hint
}

// Codes of Error, one per kind of failure that callers tell apart.
const (
	CodeUsage       = "usage"       // bad input; exit code 2
	CodeKubeconfig  = "kubeconfig"  // none, unreadable, or no such context
	CodeCredentials = "credentials" // expired or refused (401)
	CodeForbidden   = "forbidden"   // RBAC: names verb and resource
	CodeUnreachable = "unreachable" // API server
	CodeNamespace   = "namespace"   // missing, quota, PodSecurity
	CodeImage       = "image"       // cannot be pulled
	CodeAgent       = "agent"       // pod did not become ready, version mismatch
	CodeConflict    = "conflict"    // a range collides with something local; --force is needed
	CodeExists      = "exists"      // second connect to the same cluster
	CodeNotFound    = "not found"   // no such session
	CodeDenied      = "denied"      // caller not allowed
	CodeTUN         = "tun"         // no /dev/net/tun
	CodeDNS         = "dns"         // the OS's DNS settings could not be made
	CodeDaemon      = "daemon"      // the daemon does not run, or went away
	CodeUnsupported = "unsupported" // on this operating system
	CodeInternal    = "internal"    // a bug or an I/O error
	CodeCanceled    = "canceled"    // disconnected while connecting
	CodeTimeout     = "timeout"     // Options.Timeout passed
)

// PingRequest asks a session to measure the way to a target in the cluster.
type PingRequest struct {
	ID      string        `json:"id,omitempty"`      // empty: the caller's only session
	Context string        `json:"context,omitempty"` // or by context
	Target  string        `json:"target"`            // IP, pod, service; also svc/NAME, pod/NAME, NAME.NAMESPACE, IP:PORT
	Count   int           `json:"count,omitempty"`   // 0: 4
	Timeout time.Duration `json:"timeout,omitempty"` // of each probe; 0: 3 s
}

// PingReply is one line of the ping stream.
type PingReply struct {
	Seq    int           `json:"seq"`
	Target string        `json:"target"` // what was probed: "10.244.1.7 (pod demo/echo-0), ICMP" or "10.96.3.4:80, TCP connect"
	RTT    time.Duration `json:"rtt,omitempty"`
	Error  string        `json:"error,omitempty"` // no answer, refused, ...
}

// Facts is what the daemon can tell a doctor without changing anything.
type Facts struct {
	Version     string     `json:"version"`
	Socket      string     `json:"socket"`
	TUN         string     `json:"tun"`     // "ok" or the reason why no device can be made
	DNSMode     string     `json:"dnsMode"` // what "auto" would choose, with the reason in DNSWhy
	DNSWhy      string     `json:"dnsWhy"`
	Congestion  string     `json:"congestion"`            // TCP congestion control in force for routes
	Conflicts   []Conflict `json:"conflicts,omitempty"`   // of the prefixes given in the request
	SessionPath string     `json:"sessionPath,omitempty"` // the session binary and whether it may be used
	Leftovers   []string   `json:"leftovers,omitempty"`   // what a dead daemon left behind
}

// Conflict is a local network that a cluster range collides with.
type Conflict struct {
	Prefix netip.Prefix `json:"prefix"` // of the cluster
	Local  string       `json:"local"`  // "route 10.244.0.0/16 dev tun0 (another VPN)", "DNS server 10.96.0.53", "session X (context b)"
	Flag   string       `json:"flag"`   // what resolves it: "--exclude-ips 10.244.3.0/24"
}
