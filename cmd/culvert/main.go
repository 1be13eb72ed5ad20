// Command culvert is the command line of Culvert: it puts this machine on a
// Kubernetes cluster's network by asking culvertd, the daemon, over its Unix
// socket. Installed as kubectl-culvert it is `kubectl culvert`. Its hidden role
// `session` is what the daemon starts, as the calling user, for each cluster.
package main

import (
	"context"
	"os"
)

func main() {
	a := newApp(os.Args[0], os.Stdin, os.Stdout, os.Stderr)
	os.Exit(a.run(context.Background(), os.Args[1:]))
}
