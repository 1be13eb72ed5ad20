package cluster

import (
	"fmt"
	"os"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/culvert-dev/culvert/internal/version"
)

// access is what one reading of the kubeconfig gave.
type access struct {
	config        *rest.Config // as kubectl would make it; never changed
	identity      string
	client, watch *rest.RESTClient
}

// current is the access by the kubeconfig as it is now: somebody logs in again,
// and many a tool writes the new token or certificate into the file. (Exec
// plugins and token files are asked again by client-go itself.) One that cannot
// be read, or that means another cluster by now, changes nothing. What is open
// already, a carrier or a watch, goes on with what it began with.
func (c *Cluster) current() *access {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.stamp(); now != c.seen {
		c.seen = now // one that is half written changes once more
		if a, err := c.load(); err == nil && a.identity == c.identity {
			c.access.Store(a)
		}
	}
	return c.access.Load()
}

// stamp changes with the kubeconfig's files.
func (c *Cluster) stamp() string {
	var b strings.Builder
	for _, path := range c.rules.GetLoadingPrecedence() {
		if info, err := os.Stat(path); err == nil {
			fmt.Fprintf(&b, "%s %d %d\n", path, info.ModTime().UnixNano(), info.Size())
		}
	}
	return b.String()
}

// load reads the kubeconfig and makes the clients; it opens no connection.
func (c *Cluster) load() (*access, error) {
	raw, err := c.rules.Load()
	if err != nil {
		return nil, err
	}
	loaded := clientcmd.NewNonInteractiveClientConfig(*raw, c.context, &clientcmd.ConfigOverrides{}, c.rules)
	config, err := loaded.ClientConfig()
	if err != nil {
		return nil, err
	}
	if e := config.ExecProvider; e != nil && e.InteractiveMode == clientcmdapi.AlwaysExecInteractiveMode {
		// A session has no terminal, and client-go would not even start such a
		// plugin. The CLI has run it with one a moment ago: what the user did
		// there usually lasts, and a plugin that does want him again fails, which
		// is shown as "needs login".
		e.InteractiveMode = clientcmdapi.IfAvailableExecInteractiveMode
	}
	server, err := parseServer(config.Host)
	if err != nil {
		return nil, fmt.Errorf("context %q: %w", c.context, err)
	}
	if err := rest.LoadTLSFiles(config); err != nil {
		return nil, err
	}
	// A session asks little, but in bursts: a dozen access reviews and list pages
	// while it connects, forty reviews and as many changes for an intercept. client-go's
	// default of 5 a second would take longer than the connection itself; a burst of
	// 100 made the fourth command of a minute wait 0.6 s.
	config.QPS, config.Burst = 100, 400
	config.UserAgent = "culvert/" + version.Version
	config.WarningHandler = rest.NoWarnings{}
	config.WarningHandlerWithContext = rest.NoWarnings{}

	a := &access{config: config, identity: identity(config.CAData, server)}
	// Not of a.config: what comes through pods/proxy is a pod's answer, and no
	// clock to trust.
	timed := c.clock.wrap(config)
	bounded := rest.CopyConfig(timed)
	bounded.Timeout = requestTimeout
	if a.client, err = newREST(bounded); err != nil {
		return nil, err
	}
	if a.watch, err = newREST(timed); err != nil {
		return nil, err
	}
	return a, nil
}
