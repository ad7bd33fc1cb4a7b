// Shows the documentation of the routes at /docs with Swagger UI.
"use strict";

SwaggerUIBundle({ url: "openapi.json", dom_id: "#routes", deepLinking: true, validatorUrl: null });
