package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"golang.org/x/sys/unix"
)

// fakeSession is a session without a cluster. Labels of the options say what it
// does: do=fail|crash|hang|garbage|stubborn, plan=CIDR,..., dns=DOMAIN,
// identity=NAME.
func fakeSession() {
	conn, err := link.FromDaemon()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	f := &fake{conn: conn, quit: make(chan int, 1)}
	conn.Handle(link.MethodDisconnect, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		if f.start.Options.Labels["do"] == "stubborn" {
			select {}
		}
		fmt.Println("told to disconnect")
		f.quit <- 0
		return nil, nil, nil
	})
	conn.Handle(link.MethodPing, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var req api.PingRequest
		if err := json.Unmarshal(params, &req); err != nil {
			return nil, nil, err
		}
		if req.Target == "error" {
			return nil, nil, &api.Error{Code: api.CodeNotFound, Message: "no\x1b[31m such target"}
		}
		return []api.PingReply{{Target: req.Target, RTT: time.Millisecond}}, nil, nil
	})
	peer := api.Peer{Name: "ph\x1bone", PublicKey: "key", From: "\x1b[31m1.2.3.4:5"}
	for method, answer := range map[string]any{
		link.MethodPeers: []api.Peer{peer}, link.MethodPeerRemove: peer,
		link.MethodPeerAdd: api.PeerConfig{Name: "phone", Endpoint: "\x1b[31m1.2.3.4:5", Search: []string{"a\x1b"}},
	} {
		conn.Handle(method, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
			var req api.PeerRequest
			if err := json.Unmarshal(params, &req); err != nil {
				return nil, nil, err
			}
			if req.Name == "error" {
				return nil, nil, &api.Error{Code: api.CodeExists, Message: "no\x1b[31m such peer", Hint: "x"}
			}
			return answer, nil, nil
		})
	}
	f.intercepts()
	conn.Handle(link.MethodSiblings, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		fmt.Printf("siblings %s\n", params)
		return nil, nil, nil
	})
	go func() {
		conn.Run(context.Background())
		os.Exit(4) // the daemon is gone
	}()
	if err := f.run(); err != nil {
		conn.Call(context.Background(), link.MethodStatus, api.Session{State: api.Disconnected, Error: asAPI(err)}, nil)
		os.Exit(1)
	}
	os.Exit(<-f.quit)
}

type fake struct {
	conn  *link.Conn
	start link.Start
	quit  chan int
	tun   *os.File // kept open, as a session does
}

func (f *fake) call(method string, in, out any) ([]*os.File, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return f.conn.Call(ctx, method, in, out)
}

func (f *fake) run() error {
	if _, err := f.call(link.MethodHello, nil, &f.start); err != nil {
		return err
	}
	labels := f.start.Options.Labels
	cwd, _ := os.Getwd()
	groups, _ := os.Getgroups()
	status, _ := os.ReadFile("/proc/self/status")
	nnp := strings.Contains(string(status), "NoNewPrivs:\t1")
	caps := strings.Contains(string(status), "CapEff:\t0000000000000000") && strings.Contains(string(status), "CapPrm:\t0000000000000000")
	sid, _ := unix.Getsid(0)
	self, _ := json.Marshal(map[string]any{
		"uid": os.Getuid(), "gid": os.Getgid(), "groups": groups, "nnp": nnp, "nocaps": caps, "cwd": cwd,
		"leader": sid == os.Getpid(), "env": os.Environ(), "restart": f.start.Restart,
		"remembered": f.start.Remembered, "network": f.start.Network != nil, "granted": f.start.Granted, "fds": openFiles(),
	})
	fmt.Printf("self %s\n", self)
	if f.start.Revert {
		end := api.Session{State: api.Disconnected}
		if _, err := os.Stat("/run/home/alice/cluster-away"); err == nil {
			end.Error = &api.Error{Code: api.CodeUnreachable, Message: "the cluster is away"}
		}
		os.WriteFile("/run/home/alice/reverted", []byte(f.start.ID), 0o644)
		f.call(link.MethodStatus, end, nil)
		f.quit <- 0
		return nil
	}
	switch labels["do"] {
	case "fail":
		return &api.Error{Code: api.CodeForbidden, Message: "pods is forbidden\x1b[31m", Hint: "ask your admin"}
	case "crash":
		fmt.Println("panic: the fake crashed")
		os.Exit(3)
	case "crash-later": // when there may be something in the cluster
		if f.start.Restart == 0 {
			f.call(link.MethodRemember, "an agent", nil)
			fmt.Println("panic: the fake crashed")
			os.Exit(3)
		}
		fallthrough
	case "hang":
		f.call(link.MethodStatus, api.Session{State: api.Connecting, Step: "hanging"}, nil)
		return nil
	case "orphan": // an exec plugin that outlives its session
		exec.Command("/bin/sleep", "1000").Start()
		fmt.Println("panic: the fake crashed and left a child")
		os.Exit(3)
	case "garbage":
		s := os.NewFile(uintptr(linkFD()), "link")
		s.Write(bytes.Repeat([]byte{0xff}, 1000))
		select {}
	}
	f.call(link.MethodStatus, api.Session{State: api.Connecting, Step: "agent", Context: f.start.Options.Context}, nil)
	if _, err := f.call(link.MethodExclude, link.Exclude{Addrs: []netip.Addr{netip.MustParseAddr("203.0.113.9")}}, nil); err != nil {
		return err
	}
	n := link.Network{Identity: labels["identity"], Context: f.start.Options.Context, MTU: 9000}
	if n.Identity == "" {
		n.Identity = n.Context
	}
	plan := labels["plan"]
	if plan == "" {
		plan = "10.96.0.0/16,10.244.0.0/16"
	}
	for _, p := range strings.Split(plan, ",") {
		n.Plan = append(n.Plan, api.Route{Prefix: netip.MustParsePrefix(p), Source: "test"})
	}
	n.Excluded = []api.Route{{Prefix: netip.MustParsePrefix("10.244.9.0/24"), Source: "--exclude-ips"}}
	if d := labels["dns"]; d != "" {
		n.DNS = &link.DNS{ClusterDomain: d, Domains: []string{d}}
	}
	for _, n.Active = range []bool{false, true} {
		var granted link.Granted
		files, err := f.call(link.MethodConfigure, n, &granted)
		if err != nil {
			return err
		}
		text, _ := json.Marshal(granted)
		fmt.Printf("granted %s\n", text)
		for i, name := range granted.Files {
			switch name {
			case "tun":
				f.tun = files[i]
			case "dns-udp":
				go answerUDP(files[i])
			}
		}
	}
	var ids []string
	if _, err := f.call(link.MethodSessions, nil, &ids); err != nil {
		return err
	}
	fmt.Println("sessions", ids)
	f.call(link.MethodRemember, map[string]int{"pid": os.Getpid()}, nil)
	if _, err := f.call(link.MethodStatus, api.Session{State: api.Connected, ID: "forged", UID: 0, Context: n.Context, Agent: api.AgentStatus{Pod: "p"}}, nil); err != nil {
		return err
	}
	fmt.Println("connected")
	return nil
}

// answerUDP answers every packet with the process's id.
func answerUDP(file *os.File) {
	c, err := net.FilePacketConn(file)
	if err != nil {
		panic(err)
	}
	buf := make([]byte, 512)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		c.WriteTo(fmt.Appendf(nil, "%d", os.Getpid()), from)
	}
}

// openFiles lists what was inherited: nothing but stdio and the link (and what Go opens itself).
func openFiles() (list []string) {
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err == nil && !strings.HasPrefix(target, "anon_inode:") && !strings.HasPrefix(target, "/proc/") && !strings.HasPrefix(target, "/sys/fs/cgroup/") {
			list = append(list, target)
		}
	}
	return list
}

// linkFD finds the link's descriptor, to misuse it.
func linkFD() int {
	for fd := 3; fd < 64; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			return fd
		}
	}
	return -1
}
