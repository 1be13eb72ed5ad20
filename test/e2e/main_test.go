//go:build e2e

// Package e2e tries the whole product on the real test cluster: real agent
// image, real TUN device, and the CLI as an ordinary user with the RBAC that
// deploy/rbac ships. `make e2e` builds everything and runs it, as root.
package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// keep leaves the cluster and the laptop's files as they are at the end.
var keep = flag.Bool("keep", false, "leave the test cluster up")

// lab is the laptop of all tests. Tests run one after another.
var lab *netlab.Machine

// image is the agent image in the nodes.
var image string

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run()) // no test runs
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	var err error
	if lab, err = netlab.New(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		lab.Close() // the daemon first: it gives back the laptop's names
		if neighbour != nil {
			neighbour.Close()
		}
		if !*keep {
			lab.Cluster("down", "--all")
		}
	}()
	for _, name := range []string{"", "b"} {
		args := []string{"up"}
		if name != "" {
			args = append(args, "--name", name)
		}
		cmd := lab.ClusterCommand(args...)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintf(os.Stderr, "testcluster %v: %v\n", args, err)
			return 1
		}
	}
	if image, err = lab.LoadImage("", "b"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := lab.StartDaemon(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// kubeconfig is the path of a user's kubeconfig.
func kubeconfig(t *testing.T, cluster, user string) string {
	t.Helper()
	path, err := lab.Kubeconfig(cluster, user)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// connect connects as Alice with the developer's kubeconfig and disconnects at
// the end of the test.
func connect(t *testing.T, more ...string) api.Session {
	t.Helper()
	return connectAs(t, netlab.Alice, "", "developer", more...)
}

func connectAs(t *testing.T, u netlab.User, cluster, user string, more ...string) api.Session {
	t.Helper()
	args := append([]string{"connect", "--kubeconfig", kubeconfig(t, cluster, user), "--image", image}, more...)
	r := lab.Culvert(u, args...)
	t.Cleanup(func() {
		if r := lab.Culvert(u, "disconnect"); r.Code != 0 {
			t.Errorf("disconnect: %v", r)
		}
		if t.Failed() {
			t.Logf("daemon:\n%s", lab.Tail(60))
		}
	})
	if r.Code != 0 {
		t.Fatalf("connect: %v\nlogs: %v\ndaemon:\n%s", r, lab.Culvert(u, "logs"), lab.Tail(40))
	}
	t.Logf("connected in %v", r.Took.Round(10*time.Millisecond))
	sessions := status(t, u)
	if len(sessions) == 0 {
		t.Fatal("connected, but status shows no session")
	}
	for _, s := range sessions {
		if want := "culvert-test" + dash(cluster); s.Context == want {
			return s
		}
	}
	t.Fatalf("no session of cluster %q among %+v", cluster, sessions)
	return api.Session{}
}

func dash(cluster string) string {
	if cluster == "" {
		return ""
	}
	return "-" + cluster
}

// status is what `culvert status` shows to a user.
func status(t *testing.T, u netlab.User) []api.Session {
	t.Helper()
	r := lab.Culvert(u, "status", "-o", "json")
	if r.Code != 0 {
		t.Fatalf("status: %v", r)
	}
	var sessions []api.Session
	if err := json.Unmarshal([]byte(r.Stdout), &sessions); err != nil {
		t.Fatalf("status -o json: %v in %s", err, r.Stdout)
	}
	return sessions
}

// waitState waits until the user's only session is in a state.
func waitState(t *testing.T, u netlab.User, want api.State, within time.Duration) api.Session {
	t.Helper()
	var last []api.Session
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		last = status(t, u)
		if len(last) == 1 && last[0].State == want {
			return last[0]
		}
	}
	t.Fatalf("not %s within %v: %+v\nlogs: %v", want, within, last, lab.Culvert(u, "logs"))
	return api.Session{}
}

// kubectl runs kubectl as the cluster's admin.
func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	r := lab.Kubectl("", nil, args...)
	if r.Code != 0 {
		t.Fatalf("kubectl %v: %v", args, r)
	}
	return strings.TrimSpace(r.Stdout)
}

// apply gives a manifest to the cluster and removes it at the end of the test.
func apply(t *testing.T, manifest string) {
	t.Helper()
	if r := lab.Kubectl("", strings.NewReader(manifest), "apply", "-f", "-"); r.Code != 0 {
		t.Fatalf("kubectl apply: %v", r)
	}
	t.Cleanup(func() {
		lab.Kubectl("", strings.NewReader(manifest), "delete", "--wait", "--ignore-not-found", "-f", "-")
	})
}

// sh runs a shell command as Alice on the laptop and wants exit code 0.
func sh(t *testing.T, command string) string {
	t.Helper()
	r := lab.Run(netlab.Alice, "/bin/sh", "-c", command)
	if r.Code != 0 {
		t.Fatalf("%s: %v", command, r)
	}
	return strings.TrimSpace(r.Stdout)
}

// root runs a shell command as root on the laptop.
func root(t *testing.T, command string) string {
	t.Helper()
	r := lab.Run(netlab.Root, "/bin/sh", "-c", command)
	if r.Code != 0 {
		t.Fatalf("%s: %v", command, r)
	}
	return strings.TrimSpace(r.Stdout)
}

// link sets the laptop's cable and makes it perfect again at the end.
func link(t *testing.T, args ...string) {
	t.Helper()
	if r := lab.Cluster(append([]string{"link"}, args...)...); r.Code != 0 {
		t.Fatalf("testcluster link %v: %v", args, r)
	}
	t.Cleanup(func() { lab.Cluster("link", "--reset") })
}

func background(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	return ctx
}
